"""Command-line programs, one file a task; a package only so that they can share parts."""
