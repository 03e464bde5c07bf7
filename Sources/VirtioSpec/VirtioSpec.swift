// VirtioSpec: see ARCHITECTURE.md.
