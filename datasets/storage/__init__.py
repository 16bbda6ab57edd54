"""Bytes on disk, and nothing of pictures: files, claims, locks, LMDB, arrays, streams."""
