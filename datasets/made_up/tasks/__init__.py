"""The down-stream tasks' annotation files of a made-up world; mirrors `text_db/annotations`."""
