import CLinux
import Glibc
import HostSystem
import TestSupport
import Testing

/// An unlinked file in /tmp with these bytes.
private func temporaryFile(_ bytes: [UInt8] = []) throws -> OwnedFD {
  let fd = try OwnedFD.open("/tmp", O_RDWR | 0o20200000)  // O_TMPFILE
  try fd.writeAll(bytes)
  return fd
}

private func pattern(_ count: Int, seed: UInt8 = 7) -> [UInt8] { (0..<count).map { UInt8(truncatingIfNeeded: $0 &* 31) &+ seed } }

/// A ring, or nil where the host forbids io_uring.
private func ring(_ configuration: IORing.Configuration) throws -> IORing? {
  do { return try IORing(configuration) } catch {
    if error.errno == .notPermitted || error.errno == .noSuchSystemCall { return nil }
    throw error
  }
}

extension IORing {
  /// Enters and takes exactly `count` completions.
  mutating func collect(_ count: Int) -> [IOCompletion] {
    var taken: [IOCompletion] = []
    for _ in 0..<1000 where taken.count < count {
      let result = enter(waitingFor: 1)
      #expect(result == 0)
      while let completion = nextCompletion() { taken.append(completion) }
    }
    return taken
  }
}

@Suite struct IORingTests {
  @Test func writtenBytesAreReadBackAtTheirOffset() throws {
    guard var ring = try ring(.init(capacity: 8)) else { return }
    let fd = try temporaryFile()
    let data = pattern(8192)
    var back = [UInt8](repeating: 0, count: 8192)
    data.withUnsafeBytes {
      check(ring.prepareWrite(.descriptor(fd.rawValue), from: $0.baseAddress!, byteCount: 8192, offset: 4096, userData: 1))
      let done = ring.collect(1)
      #expect(done.map(\.result) == [8192])
      #expect(done.map(\.userData) == [1])
    }
    back.withUnsafeMutableBytes {
      check(ring.prepareRead(.descriptor(fd.rawValue), into: $0.baseAddress!, byteCount: 8192, offset: 4096, userData: 2))
      #expect(ring.collect(1).map(\.result) == [8192])
    }
    #expect(back == data)
    #expect(try fd.status().byteCount == 12288)
  }

  @Test func vectorsScatterAndGather() throws {
    guard var ring = try ring(.init(capacity: 4)) else { return }
    let data = pattern(300)
    let fd = try temporaryFile(data)
    var first = [UInt8](repeating: 0, count: 100)
    var second = [UInt8](repeating: 0, count: 150)
    first.withUnsafeMutableBytes { a in
      second.withUnsafeMutableBytes { b in
        let vectors = [iovec(iov_base: a.baseAddress, iov_len: 100), iovec(iov_base: b.baseAddress, iov_len: 150)]
        vectors.withUnsafeBufferPointer {
          check(ring.prepareReadVectored(.descriptor(fd.rawValue), into: $0.baseAddress!, count: 2, offset: 50, userData: 9))
          #expect(ring.collect(1).map(\.result) == [250])
        }
      }
    }
    #expect(first + second == Array(data[50...]))
  }

  @Test func aReadAtTheEndOfTheFileIsShort() throws {
    guard var ring = try ring(.init(capacity: 4)) else { return }
    let fd = try temporaryFile(pattern(100))
    var back = [UInt8](repeating: 0, count: 64)
    back.withUnsafeMutableBytes {
      check(ring.prepareRead(.descriptor(fd.rawValue), into: $0.baseAddress!, byteCount: 64, offset: 80, userData: 1))
      check(ring.prepareRead(.descriptor(fd.rawValue), into: $0.baseAddress!, byteCount: 64, offset: 100, userData: 2))
      let done = ring.collect(2).sorted { $0.userData < $1.userData }
      #expect(done.map(\.result) == [20, 0])
    }
  }

  @Test func errorsComeAsNegatedErrno() throws {
    guard var ring = try ring(.init(capacity: 4)) else { return }
    let fd = try OwnedFD.open("/dev/null", O_RDONLY)
    var byte: UInt8 = 0
    check(ring.prepareWrite(.descriptor(fd.rawValue), from: &byte, byteCount: 1, offset: 0, userData: 1))
    #expect(ring.collect(1).map(\.result) == [-EBADF])
  }

  @Test func allocateGrowsAndPunchesAndSyncSucceeds() throws {
    guard var ring = try ring(.init(capacity: 4)) else { return }
    let fd = try temporaryFile(pattern(65536))
    check(ring.prepareAllocate(.descriptor(fd.rawValue), mode: 0, offset: 0, byteCount: 131072, userData: 1))
    #expect(ring.collect(1).map(\.result) == [0])
    #expect(try fd.status().byteCount == 131072)
    check(ring.prepareAllocate(.descriptor(fd.rawValue), mode: 3, offset: 0, byteCount: 4096, userData: 2))
    check(ring.prepareDataSync(.descriptor(fd.rawValue), userData: 3))
    #expect(ring.collect(2).map(\.result) == [0, 0])
    var back = [UInt8](repeating: 1, count: 4097)
    #expect(back.withUnsafeMutableBytes { pread(fd.rawValue, $0.baseAddress, 4097, 0) } == 4097)
    #expect(back[..<4096].allSatisfy { $0 == 0 })
    #expect(back[4096] == pattern(65536)[4096])
  }

  @Test func aRepeatingPollReportsEverySignalWithoutReading() throws {
    guard var ring = try ring(.init(capacity: 4)) else { return }
    let event = try EventFD()
    check(ring.preparePoll(.descriptor(event.fd.rawValue), for: .readable, repeating: true, userData: 5))
    #expect(ring.enter() == 0)
    check(ring.nextCompletion() == nil, "nothing was signalled yet")
    for _ in 0..<3 {
      event.signal()
      let done = ring.collect(1)
      #expect(done.count == 1)
      #expect(done.allSatisfy { $0.userData == 5 && $0.hasMore && $0.result & 1 == 1 })
    }
    #expect(event.drain() == 3)
    check(ring.preparePollRemove(5, userData: 6))
    let ended = ring.collect(2)
    #expect(ended.contains { $0.userData == 5 && $0.result == -ECANCELED && !$0.hasMore })
    #expect(ended.contains { $0.userData == 6 && $0.result == 0 })
  }

  @Test func aFullQueueRefusesAndLosesNothing() throws {
    guard var ring = try ring(.init(capacity: 4)) else { return }
    let fd = try temporaryFile(pattern(16))
    var byte: UInt8 = 0
    for index in 0..<4 { check(ring.prepareRead(.descriptor(fd.rawValue), into: &byte, byteCount: 1, offset: 0, userData: UInt64(index))) }
    #expect(ring.freeSlots == 0)
    check(!ring.prepareRead(.descriptor(fd.rawValue), into: &byte, byteCount: 1, offset: 0, userData: 99))
    #expect(Set(ring.collect(4).map(\.userData)) == [0, 1, 2, 3])
    #expect(ring.freeSlots == 4)
    // The indices run through many laps.
    for lap in 0..<100 {
      for index in 0..<3 { check(ring.prepareDataSync(.descriptor(fd.rawValue), userData: UInt64(lap * 3 + index))) }
      #expect(Set(ring.collect(3).map(\.userData)) == Set((0..<3).map { UInt64(lap * 3 + $0) }))
    }
  }

  @Test func aRestrictedRingDoesOnlyWhatItWasMadeFor() throws {
    let fd = try temporaryFile(pattern(64))
    var configuration = IORing.Configuration(capacity: 4)
    configuration.files = [fd.rawValue]
    configuration.allowedOperations = [.read, .poll]
    guard var ring = try ring(configuration) else { return }
    #expect(ring.traits.isRestricted)
    var byte: UInt8 = 0
    check(ring.prepareRead(.registered(0), into: &byte, byteCount: 1, offset: 3, userData: 1))
    check(ring.prepareWrite(.registered(0), from: &byte, byteCount: 1, offset: 0, userData: 2))
    check(ring.prepareDataSync(.registered(0), userData: 3))
    let done = ring.collect(3).sorted { $0.userData < $1.userData }
    #expect(done.map(\.result) == [1, -EACCES, -EACCES])
    #expect(byte == pattern(64)[3])
    // Nothing can be registered any more.
    var number = fd.rawValue
    #expect(clinux_io_uring_register(ring.fd.rawValue, 6, &number, 1) < 0)
  }

  @Test func theRingIsClosedWithItsOwner() throws {
    var number: CInt = -1
    do {
      guard let ring = try ring(.init(capacity: 4)) else { return }
      number = ring.fd.rawValue
      #expect(ring.traits.capacity == 4)
    }
    #expect(clinux_fcntl(number, F_GETFD, 0) < 0)
  }
}
