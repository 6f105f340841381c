"""Where other libraries meet this one. Nothing is imported here: each part is loaded when needed."""
