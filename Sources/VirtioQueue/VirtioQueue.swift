// VirtioQueue: see ARCHITECTURE.md.
