"""The down-stream tasks' annotation files: one file a task, the rows in `table`."""
