import Testing
import TestSupport
import VMMemory
import VirtioQueue
import VirtioSpec

/// One combination of layout, features and size.
struct RingKind: CustomTestStringConvertible, Sendable {
  var features: FeatureSet
  var size: UInt16
  var testDescription: String { "\(features.names(for: nil).dropFirst()) of \(size)" }

  static let all: [RingKind] = {
    var kinds: [RingKind] = []
    for options in [[], [.eventIndex], [.indirectDescriptors], [.eventIndex, .indirectDescriptors], [.inOrder, .eventIndex], [.inOrder]]
      as [FeatureSet]
    {
      for size in [1, 2, 8, 64] as [UInt16] { kinds.append(RingKind(features: options.union(.version1), size: size)) }
      for size in [1, 3, 8, 61] as [UInt16] { kinds.append(RingKind(features: options.union([.version1, .packedRing]), size: size)) }
    }
    return kinds
  }()
}

/// A driver and a device that each may do a step whenever chance says so, and that sleep as real ones do: after enabling
/// notifications and finding nothing, until the other one decides that a notification is due.
struct Conversation: ~Copyable {
  var pair: QueuePair
  var random: SeededGenerator
  let kind: RingKind
  /// What the driver offered under each head.
  var offered: [UInt16: (buffers: [DriverBuffer], serial: UInt32)] = [:]
  /// What the device holds, in the order it took it.
  var held: [(token: ChainToken, serial: UInt32)] = []
  /// What the device has reported, in order.
  var reported: [(head: UInt16, written: UInt32, serial: UInt32)] = []
  var driverSleeps = false
  var deviceSleeps = false
  var serial: UInt32 = 0
  var finished: UInt32 = 0
  var kicks = 0
  var calls = 0
  var complaint: String?

  init(_ kind: RingKind, seed: UInt64) throws {
    let pair = try QueuePair(size: kind.size, kind.features)
    self.kind = kind
    self.pair = pair
    random = SeededGenerator(state: seed)
  }

  mutating func complain(_ text: String) { if complaint == nil { complaint = text } }

  mutating func run(chains: UInt32) {
    // Bounded: both asleep with work to do is a lost notification and ends the run.
    while finished < chains, complaint == nil {
      if driverSleeps && deviceSleeps { return complain("Both sleep after \(finished) of \(serial) chains") }
      if Bool.random(using: &random) {
        if !driverSleeps { driverStep(chains) }
      } else if !deviceSleeps {
        deviceStep()
      }
    }
  }

  // MARK: Driver

  private mutating func driverStep(_ limit: UInt32) {
    for _ in 0..<Int.random(in: 1...4, using: &random) where serial < limit { offer() }
    if pair.driver.publish() {
      kicks += 1
      deviceSleeps = false
    }
    if Bool.random(using: &random) { collect() }
    guard Int.random(in: 0..<4, using: &random) == 0 else { return }
    if Bool.random(using: &random) { pair.driver.disableCalls() }
    // With nothing outstanding there is nothing to be woken for.
    if !pair.driver.enableCalls(), !offered.isEmpty { driverSleeps = true }
  }

  private mutating func offer() {
    serial += 1
    // The first buffer carries the serial number, so that the device can prove what it was given.
    let place = GuestFixture.buffers + UInt64(serial % 4096) * 64
    let indirect = kind.features.contains(.indirectDescriptors) && Bool.random(using: &random)
    let greatest = indirect ? 6 : min(4, Int(kind.size))
    let count = Int.random(in: 1...greatest, using: &random)
    let split = Int.random(in: 1...count, using: &random)
    var buffers = [readable(place, 4)]
    for position in 1..<max(count, 1) where position < count {
      let length = UInt32.random(in: 1...5000, using: &random)
      let address = UInt64.random(in: GuestFixture.buffers...(GuestFixture.end - 5000), using: &random)
      buffers.append(DriverBuffer(GuestAddress(address), length, isDeviceWritable: position >= split))
    }
    let head: UInt16?
    if indirect {
      head = pair.driver.addIndirect(buffers.span, table: GuestAddress(0x2_0000 + UInt64(serial % 256) * 128))
    } else {
      head = pair.driver.add(buffers.span)
    }
    guard let head else {
      serial -= 1
      return
    }
    if offered[head] != nil { complain("Head \(head) offered twice") }
    _ = pair.memory.store(serial, at: GuestAddress(place))
    offered[head] = (buffers, serial)
  }

  private mutating func collect() {
    while complaint == nil {
      switch pair.driver.nextUsed() {
      case .empty: return
      case .broken: complain("The device reported nonsense")
      case .used(let head, let written):
        guard offered.removeValue(forKey: head) != nil, !reported.isEmpty else { return complain("Used without having been offered") }
        let report = reported.removeFirst()
        if report.head != head { complain("Head \(head) used instead of \(report.head)") }
        if let written, written != report.written { complain("\(written) bytes written instead of \(report.written)") }
        if written == nil && report.written != .max { complain("Length lost") }
        finished += 1
      }
    }
  }

  // MARK: Device

  private mutating func deviceStep() {
    if Bool.random(using: &random) { pair.device.disableKicks() }
    if Bool.random(using: &random) { pair.device.withdrawKicks() }
    let greed = Int.random(in: 1...8, using: &random)
    for _ in 0..<greed {
      if !take() { break }
    }
    if Bool.random(using: &random) { complete() }
    guard Int.random(in: 0..<4, using: &random) == 0 else { return }
    complete()
    if held.isEmpty, !pair.device.enableKicks() { deviceSleeps = true }
  }

  private mutating func take() -> Bool {
    switch pair.next() {
    case .empty: return false
    case .broken(let reason):
      complain("Broken: \(reason)")
      return false
    case .chain: break
    }
    let token = pair.chain.token
    if Int.random(in: 0..<16, using: &random) == 0 {
      pair.device.giveBack(token)
      return false
    }
    guard let (buffers, serial) = offered[token.head] else {
      complain("Took what was not offered")
      return false
    }
    if pair.chain.pieces() != pair.memory.expectedPieces(buffers) { complain("Pieces differ from the buffers") }
    if pair.chain.takeReadable(UInt32.self) != serial { complain("Bytes differ from what was written") }
    held.append((token, serial))
    return true
  }

  private mutating func complete() {
    let inOrder = kind.features.contains(.inOrder)
    for _ in 0..<Int.random(in: 0...8, using: &random) where !held.isEmpty {
      if inOrder, held.count > 1, Bool.random(using: &random) {
        let skipped = held.removeFirst()
        pair.device.coalesce(skipped.token)
        reported.append((skipped.token.head, .max, skipped.serial))
        finishFirst()
      } else if inOrder {
        finishFirst()
      } else {
        finish(at: Int.random(in: 0..<held.count, using: &random))
      }
    }
    if pair.device.publish() {
      calls += 1
      driverSleeps = false
    }
  }

  private mutating func finishFirst() { finish(at: 0) }

  private mutating func finish(at index: Int) {
    let (token, serial) = held.remove(at: index)
    let written = UInt32.random(in: 0...3, using: &random)
    pair.device.complete(token, written: written)
    reported.append((token.head, written, serial))
  }
}

@Suite("Driver and device")
struct ConversationTests {
  /// Enough chains for every index to wrap.
  @Test(arguments: RingKind.all)
  func understandEachOtherAndNeitherSleepsForEver(kind: RingKind) throws {
    var conversation = try Conversation(kind, seed: UInt64(kind.size) << 32 ^ kind.features.rawValue)
    let chains: UInt32 = kind.size >= 8 ? 70_000 : 10_000
    conversation.run(chains: chains)
    checkEqual(conversation.complaint, nil)
    checkEqual(conversation.finished, chains)
    checkEqual(conversation.pair.device.inFlightCount, 0)
    checkEqual(conversation.pair.driver.freeDescriptorCount, Int(kind.size))
    check(conversation.kicks > 0 && conversation.kicks <= chains)
    check(conversation.calls > 0 && conversation.calls <= chains)
  }
}
