"""Pages and notebook views of what a selection keeps."""
