"""Where images come from: the reference task, drawn on demand, and folders of image files."""
