// ControlProtocol: see ARCHITECTURE.md.
