// BlockDevice: see ARCHITECTURE.md.
