"""The command line: the last room, thin; one file a command, what they share in door.py."""
