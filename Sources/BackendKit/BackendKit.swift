// BackendKit: everything a vhost-user device process needs except the device. The launch contract (`LaunchArguments`),
// the start order with its place for the sandbox, READY and the end (`BackendProgram`), negotiation, memory table and
// rings (`BackendServer`), the event loop (`BackendContext`), counters and log lines. docs/backends.md leads through it.
//
// What is left to an author is one type. A `ChainDevice` says what to do with a chain, and no more: the kit drains the rings
// (entropy). A `DeviceBackend` has its queues in its own hands: many chains at a time, threads, any order of answers (block,
// net, console). There, ownership is the state machine: `start` hands the device an owned, mapped, validated queue; `stop` must
// give the same queue back; between the two nobody else touches it, and no device ever sees a half-configured ring. It chooses
// who waits for kicks: the kit's event loop, which calls `kicked(queue:)`, or the device itself, usually in a thread per queue.
//
//     struct Entropy: ChainDevice, ~Copyable {
//       let source: OwnedFD
//       var profile: DeviceProfile { DeviceProfile(device: .entropy) }
//       mutating func serve(_ chain: inout DescriptorChain, queue: Int, _ context: inout BackendContext) -> ChainAnswer {
//         if case .bytes = chain.fill(from: source, atMost: 4096) { return .done }
//         context.end(because: "The source of random bytes is gone")
//         return .later
//       }
//     }
//
//     // main.swift
//     exit(BackendProgram(type: "rng").run(OwnProgram.arguments, serving: { _ in Entropy(...) }))
