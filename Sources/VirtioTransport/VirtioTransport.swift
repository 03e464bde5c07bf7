// # VirtioTransport
//
// What a guest sees of a virtio device on PCI, as a pure state machine: configuration space with its capabilities, BAR 0
// with common configuration, ISR, device configuration, notify registers and MSI-X. It does no I/O, knows no KVM, takes
// no lock and never traps on what a guest writes: every offset, width and value is answered, and what has to happen
// outside comes back as a list of `TransportEffect`. Whoever owns the function (one lock per function) turns effects
// into ioctls and messages to a back end.
//
//     var function = try VirtioPCIFunction(.init(
//       device: .block, offeredFeatures: offered, queueSizes: [256], configuration: blockConfiguration.encoded()))
//     for effect in function.writeBAR(offset: offset, width: 2, value: value) {
//       switch effect {
//       case .activate(let activation): post(.activate(activation))   // the back end gets its queues, elsewhere
//       case .reset: post(.stop)                                       // later: function.resetCompleted()
//       case .vectorChanged(let index, let message, let isMasked): ...
//       ...
//       }
//     }
//
// A vCPU never waits: `.reset` starts a reset, and until `resetCompleted()` the status register reads as before, which
// is what the specification gives a device that needs time.
