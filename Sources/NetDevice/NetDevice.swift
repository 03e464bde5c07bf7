// NetDevice: see ARCHITECTURE.md.
