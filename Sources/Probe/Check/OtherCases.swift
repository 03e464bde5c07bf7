import Glibc
import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// Network cards, consoles, file systems and entropy devices.
enum OtherCases {
  static let all: [CheckCase] = net + console + fileSystem + entropy

  private static let entropy: [CheckCase] = [
    only(.entropy, "rng.fill", "Buffers of every size come back with at least one random byte", "virtio 1.4, 5.4.6") { context in
      let client = try context.client()
      for count in [1, 2, 64, 4096, 65536] {
        let answer = try client.exchange([], answerByteCount: count)
        try context.expect(
          answer.written >= 1 && Int(answer.written) <= count, "room for \(count) bytes comes back with \(answer.written) written")
      }
    },
    only(.entropy, "rng.different", "Two buffers have different bytes", "virtio 1.4, 5.4") { context in
      let client = try context.client()
      let first = try client.exchange([], answerByteCount: 64)
      let second = try client.exchange([], answerByteCount: 64)
      let count = Int(min(first.written, second.written, 64))
      try context.expect(
        count < 16 || first.bytes.prefix(count) != second.bytes.prefix(count), "both are \(first.bytes.prefix(count).hexText())")
    },
    only(.entropy, "rng.readable", "A buffer to be read does not end the device", "virtio 1.4, 5.4.6.1") { context in
      do {
        let client = try context.client()
        _ = try client.offer([1, 2, 3], answerByteCount: 0)
        _ = try? client.takeUsed(within: .milliseconds(100))
      }
      try context.client().ping()
    },
  ]

  private static let net: [CheckCase] = [
    only(.net, "net.mac", "The address in the configuration belongs to one card", "virtio 1.4, 5.1.4") { context in
      try context.needs(.netMAC)
      guard let space = context.offer.configuration else { throw CaseStop.notApplicable("it gives no configuration") }
      try context.expect(space[0] & 1 == 0 && space.prefix(6).contains { $0 != 0 }, "it is \(space.prefix(6).hexText())")
    },
    only(.net, "net.transmit", "Frames of every usual size are taken, with 0 bytes reported as written", "virtio 1.4, 5.1.6") { context in
      let client = try context.client()
      for count in [14, 60, 64, 590, 1514] { try transmit(client, context, count) }
    },
    only(.net, "net.transmit-pieces", "Header and frame may be cut anywhere", "virtio 1.4, 5.1.6") { context in
      let client = try context.client()
      for pieces in [[12], [5, 7], [12, 14, 20], [11, 2], [Int](repeating: 1, count: 30)] { try transmit(client, context, 100, pieces) }
    },
    only(.net, "net.transmit-short", "A frame shorter than its header does not end the device", "virtio 1.4, 5.1.6") { context in
      do {
        let client = try context.client()
        for count in [1, 11, 12, 13] {
          _ = try client.offer([UInt8](repeating: 0, count: count), answerByteCount: 0)
          _ = try? client.takeUsed(within: .milliseconds(100))
        }
      }
      try context.client().ping()
    },
    only(.net, "net.transmit-offload", "Offload fields that make no sense do not end the device", "virtio 1.4, 5.1.6") { context in
      do {
        let client = try context.client(RingClient.Setup(features: [.netChecksum, .netHostTSO4]))
        for header in [
          [1, 1, 0xFF, 0xFF, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0], [1, 4, 0, 0, 0xFF, 0xFF, 0, 0, 0xFF, 0xFF, 0, 0],
          [0xFF, 0xFF, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0],
        ] as [[UInt8]] {
          _ = try client.offer(header + [UInt8](repeating: 0xFF, count: 80), answerByteCount: 0)
          _ = try? client.takeUsed(within: .milliseconds(100))
        }
      }
      try context.client().ping()
    },
    only(.net, "net.receive-idle", "Receive buffers are not used while nothing comes", "virtio 1.4, 5.1.6") { context in
      let client = try context.client(RingClient.Setup(queue: 0))
      let head = try client.offer([], answerByteCount: 1526)
      if let used = try client.takeUsed(within: .milliseconds(50)) {
        // Something did come: then it is a whole frame with its header.
        try context.expect(used.head == head && used.written >= 12 + 14, "\(used.written) bytes are no frame with its header")
      }
    },
  ]

  private static func transmit(_ client: RingClient, _ context: CheckContext, _ count: Int, _ pieces: [Int] = []) throws {
    let frame: [UInt8] = [1, 0, 0x5E, 0, 0, 1, 2, 0, 0, 0, 0, 1, 0x88, 0xB5] + [UInt8](repeating: 0x42, count: count - 14)
    let answer = try client.exchange(
      [UInt8](repeating: 0, count: 12) + frame, answerByteCount: 0,
      shape: RingClient.Shape(name: "\(count) bytes cut at \(pieces)", readable: pieces))
    try context.expect(answer.written == 0, "a frame of \(count) bytes reports \(answer.written) bytes written")
  }

  private static let console: [CheckCase] = [
    only(.console, "console.transmit", "Output of any size is taken, with 0 bytes reported as written", "virtio 1.4, 5.3.6") { context in
      let client = try context.client()
      for count in [1, 2, 100, 4096] {
        let answer = try client.exchange([UInt8](repeating: 0x2E, count: count), answerByteCount: 0)
        try context.expect(answer.written == 0, "\(count) bytes of output report \(answer.written) bytes written")
      }
    },
    only(.console, "console.receive-idle", "Receive buffers are not used while there is no input", "virtio 1.4, 5.3.6") { context in
      let client = try context.client(RingClient.Setup(queue: 0))
      _ = try client.offer([], answerByteCount: 256)
      if let used = try client.takeUsed(within: .milliseconds(50)) {
        try context.expect(used.written > 0 && used.written <= 256, "a buffer came back with \(used.written) bytes")
      }
    },
    only(.console, "console.wrong-way", "A writable buffer in the output queue does not end the device", "virtio 1.4, 5.3.6") { context in
      do {
        let client = try context.client()
        _ = try client.offer([], answerByteCount: 64)
        _ = try? client.takeUsed(within: .milliseconds(100))
      }
      try context.client().ping()
    },
  ]

  private static let fileSystem: [CheckCase] = [
    only(.fileSystem, "fs.init", "FUSE_INIT is answered with version 7 and the request's number", "virtio 1.4, 5.11.6; linux/fuse.h") {
      context in
      try context.client().ping()
    },
    only(.fileSystem, "fs.unknown", "An unknown FUSE operation is answered with an error", "virtio 1.4, 5.11.6; linux/fuse.h") { context in
      let client = try context.client()
      try client.ping()
      let request = BlockWire.bytes(40, 4) + BlockWire.bytes(3999, 4) + BlockWire.bytes(77, 8) + [UInt8](repeating: 0, count: 24)
      let answer = try client.exchange(request, answerByteCount: 64)
      let error = Int32(truncatingIfNeeded: answer.bytes.number(at: 4, 4))
      try context.expect(answer.bytes.number(at: 8, 8) == 77, "the answer is to request \(answer.bytes.number(at: 8, 8))")
      try context.expect(error < 0, "it is answered with \(error)")
    },
    only(.fileSystem, "fs.short", "A request shorter than its header does not end the device", "virtio 1.4, 5.11.6") { context in
      do {
        let client = try context.client()
        _ = try client.offer([1, 2, 3, 4, 5], answerByteCount: 64)
        _ = try? client.takeUsed(within: .milliseconds(100))
      }
      try context.client().ping()
    },
    only(.fileSystem, "fs.no-room", "A request without room for its answer does not end the device", "virtio 1.4, 5.11.6") { context in
      do {
        let client = try context.client()
        _ = try client.offer(FuseWire.initialise(unique: 5), answerByteCount: 4)
        _ = try? client.takeUsed(within: .milliseconds(100))
      }
      try context.client().ping()
    },
  ]

  private static func only(
    _ device: DeviceID, _ id: String, _ sentence: String, _ section: String, _ body: @escaping @Sendable (CheckContext) throws -> Void
  ) -> CheckCase {
    CheckCase(id, sentence, section) { context in
      guard context.device == device else { throw CaseStop.notApplicable("the device is no \(device.name ?? "such device")") }
      try body(context)
    }
  }
}
