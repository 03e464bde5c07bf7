// DiskImage: see ARCHITECTURE.md.
