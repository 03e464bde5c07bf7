// BackendKit: everything a vhost-user device process needs except the device. The launch contract (`LaunchArguments`),
// the start order with its place for the sandbox, READY and the end (`BackendProgram`), negotiation, memory table and
// rings (`BackendServer`), the event loop (`BackendContext`), counters and log lines. What is left to an author is one type
// that conforms to `DeviceBackend`: what the device is, its configuration bytes, and what to do with a ready queue.
//
// Ownership is the state machine: `start` hands the device an owned, mapped, validated queue; `stop` must give the same
// queue back. Between the two nobody else touches it, and no device ever sees a half-configured ring.
//
// A device chooses who waits for kicks. `.loop`: the kit's event loop does and calls `kicked(queue:)`; one thread, simple
// state (console, net). `.device`: the device waits itself, usually in a thread per queue (block).
//
//     struct Entropy: DeviceBackend, ~Copyable {
//       var profile: DeviceProfile { DeviceProfile(device: .entropy, queueCount: 1, features: [.version1]) }
//       var queue: DeviceQueue?
//       mutating func start(_ queue: consuming DeviceQueue, _ context: inout BackendContext) { self.queue = consume queue }
//       mutating func stop(queue index: Int, _ context: inout BackendContext) -> DeviceQueue? { queue.take() }
//       mutating func kicked(queue index: Int, _ context: inout BackendContext) { /* fill the chains that are there */ }
//     }
//
//     // main.swift
//     exit(BackendProgram(type: "rng").run(OwnProgram.arguments) { _ in Entropy() })
