"""Where other libraries meet this one. Each part is imported when it is needed."""
