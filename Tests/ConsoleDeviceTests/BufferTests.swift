import ConsoleDevice
import Testing
import TestSupport

@Suite struct ByteRingTests {
  private func append(_ bytes: [UInt8], to ring: inout ByteRing) -> Int { bytes.withUnsafeBytes { ring.append($0) } }

  private func takeAll(_ ring: inout ByteRing) -> [UInt8] {
    var target = [UInt8](repeating: 0, count: ring.count)
    let count = target.withUnsafeMutableBytes { ring.take(into: $0) }
    return Array(target[..<count])
  }

  @Test func bytesComeOutInTheOrderTheyWentIn() {
    var ring = ByteRing(capacity: 7)
    var expected: UInt8 = 0
    var next: UInt8 = 0
    // Sizes that wrap at every possible place.
    for step in 0..<200 {
      let count = step % 8
      let piece = (0..<count).map { _ in
        next &+= 1
        return next
      }
      let taken = append(piece, to: &ring)
      checkEqual(taken, min(count, 7))
      next = next &- UInt8(count - taken)
      for byte in takeAll(&ring) {
        expected &+= 1
        checkEqual(byte, expected)
      }
      checkEqual(ring.count, 0)
    }
  }

  @Test func moreThanTheRingHoldsIsRefused() {
    var ring = ByteRing(capacity: 4)
    checkEqual(append([1, 2, 3], to: &ring), 3)
    checkEqual(append([4, 5, 6], to: &ring), 1)
    checkEqual(append([7], to: &ring), 0)
    checkEqual(takeAll(&ring), [1, 2, 3, 4])
  }

  @Test func theNewestBytesAreKeptWhenOldOnesMustGo() {
    var bytes = ByteRing(capacity: 4)
    _ = append([1, 2, 3], to: &bytes)
    checkEqual(([4, 5] as [UInt8]).withUnsafeBytes { bytes.appendDroppingOldest($0) }, 1)
    checkEqual(takeAll(&bytes), [2, 3, 4, 5])
    checkEqual(([6, 7, 8, 9, 10, 11] as [UInt8]).withUnsafeBytes { bytes.appendDroppingOldest($0) }, 2)
    checkEqual(takeAll(&bytes), [8, 9, 10, 11])
  }
}

@Suite struct EscapeFilterTests {
  private func outcomes(_ text: [UInt8]) -> [EscapeFilter.Outcome] {
    var filter = EscapeFilter()
    return text.map { filter.filter($0) }
  }

  @Test func ordinaryKeysPass() {
    #expect(outcomes([0x61, 0x03, 0x1B, 0xFF]) == [.byte(0x61), .byte(0x03), .byte(0x1B), .byte(0xFF)])
  }

  @Test func controlAThenXAsksForTheEnd() {
    #expect(outcomes([0x01, 0x78]) == [.nothing, .quit])
    #expect(outcomes([0x01, 0x58]) == [.nothing, .quit])
  }

  @Test func controlATwiceTypesOne() {
    #expect(outcomes([0x01, 0x01, 0x78]) == [.nothing, .byte(0x01), .byte(0x78)])
  }

  @Test func controlABeforeAnyOtherKeyReachesTheGuestWithIt() {
    #expect(outcomes([0x01, 0x62, 0x78]) == [.nothing, .keyAnd(0x62), .byte(0x78)])
  }
}
