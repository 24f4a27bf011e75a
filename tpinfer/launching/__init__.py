"""Starting ranks and watching over them, without torch."""
