// HostSystem: see ARCHITECTURE.md.
