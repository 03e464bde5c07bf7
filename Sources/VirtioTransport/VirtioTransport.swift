// VirtioTransport: see ARCHITECTURE.md.
