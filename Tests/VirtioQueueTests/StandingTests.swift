import Testing
import TestSupport
import VMMemory
import VirtioQueue
import VirtioSpec

@Suite("Standing chains")
struct StandingTests {
  private static let size: UInt16 = 8

  private static func buffers(_ slot: Int, _ byteCount: UInt32 = 100) -> [DriverBuffer] {
    let place = GuestFixture.buffers + UInt64(slot) * 0x1000
    return [readable(place, 16), writable(place + 0x100, byteCount), writable(place + 0x800, 1)]
  }

  /// Offers, takes on the device's side, uses, and takes back; what the device saw.
  private static func turn(_ pair: inout QueuePair, _ heads: [UInt16]) throws -> [[Piece]] {
    for head in heads { pair.driver.makeAvailable(head) }
    _ = pair.driver.publish()
    var seen: [[Piece]] = []
    for head in heads {
      guard case .chain = pair.next() else {
        Issue.record("Chain \(head) does not arrive")
        return seen
      }
      let token = pair.chain.token
      #expect(token.head == head)
      seen.append(pair.chain.pieces())
      pair.device.complete(token, written: 101)
    }
    _ = pair.device.publish()
    for head in heads { #expect(pair.driver.nextUsedStanding() == .used(head: head, written: 101)) }
    #expect(pair.driver.nextUsedStanding() == .empty)
    return seen
  }

  @Test("are made available over and over as they were written, also past the end of the index")
  func stay() throws {
    var pair = try QueuePair(size: Self.size, [.version1, .eventIndex])
    #expect(pair.driver.allowsStandingChains == true)
    pair.driver.beginStanding()
    pair.driver.writeStanding(Self.buffers(0).span, at: 0)
    pair.driver.writeStanding(Self.buffers(1).span, at: 3)
    let expected = [pair.memory.expectedPieces(Self.buffers(1)), pair.memory.expectedPieces(Self.buffers(0))]
    for _ in 0..<40000 where try Self.turn(&pair, [3, 0]) != expected {
      Issue.record("The device sees other buffers")
      return
    }
  }

  @Test("can be written anew between two requests, also shorter")
  func rewritten() throws {
    var pair = try QueuePair(size: Self.size, [.version1])
    pair.driver.beginStanding()
    for buffers in [Self.buffers(0), Array(Self.buffers(2).prefix(1)), Self.buffers(1, 7)] {
      pair.driver.writeStanding(buffers.span, at: 3)
      #expect(try Self.turn(&pair, [3]) == [pair.memory.expectedPieces(buffers)])
    }
  }

  @Test("leave no descriptor for others, and a used chain that is not outstanding is broken")
  func bounds() throws {
    var pair = try QueuePair(size: Self.size, [.version1])
    pair.driver.beginStanding()
    #expect(pair.driver.add(Self.buffers(0).span) == nil)
    pair.driver.writeStanding(Self.buffers(0).span, at: 0)
    pair.driver.makeAvailable(0)
    _ = pair.driver.publish()
    guard case .chain = pair.next() else {
      Issue.record("The chain does not arrive")
      return
    }
    let token = pair.chain.token
    pair.device.complete(token, written: 0)
    _ = pair.device.publish()
    #expect(pair.driver.nextUsedStanding() == .used(head: 0, written: 0))
    // The device's index moved once more, to the element of an earlier turn.
    let area = pair.driver.configuration
    guard let used = pair.memory.translate(area.device, byteCount: UInt64(6 + 8 * Self.size)) else {
      Issue.record("The used ring is not in memory")
      return
    }
    used.storeBytes(of: 2, toByteOffset: 2, as: UInt16.self)
    #expect(pair.driver.nextUsedStanding() == .broken)
    used.storeBytes(of: 100, toByteOffset: 2, as: UInt16.self)
    #expect(pair.driver.nextUsedStanding() == .broken)
  }

  @Test("are for split rings that are not in order")
  func kinds() throws {
    let inOrder = try QueuePair(size: Self.size, [.version1, .inOrder])
    let wrapping = try QueuePair(size: Self.size, packed)
    #expect(inOrder.driver.allowsStandingChains == false)
    #expect(wrapping.driver.allowsStandingChains == false)
  }
}
