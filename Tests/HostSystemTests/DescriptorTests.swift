import CLinux
import Glibc
import HostSystem
import TestSupport
import Testing

/// Receives with a buffer of 16 bytes that nobody looks at.
private func receive(_ socket: borrowing OwnedFD, descriptorLimit: Int = 32) -> Reception {
  let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 16, alignment: 8)
  defer { buffer.deallocate() }
  return UnixSocket.receive(socket, into: buffer, descriptorLimit: descriptorLimit)
}

private func isOpen(_ number: CInt) -> Bool { clinux_fcntl(number, F_GETFD, 0) >= 0 }

@Suite struct DescriptorTests {
  @Test func ownerClosesItsDescriptorAtTheEnd() throws {
    var number: CInt = -1
    do {
      let event = try EventFD()
      number = event.fd.rawValue
      #expect(isOpen(number))
    }
    #expect(!isOpen(number))
  }

  @Test func releasedDescriptorStaysOpen() throws {
    let fd = try OwnedFD.open("/dev/null", O_RDWR)
    let number = fd.release()
    #expect(isOpen(number))
    close(number)
  }

  @Test func openingAMissingFileNamesIt() {
    do {
      _ = try OwnedFD.open("/no/such/file", O_RDONLY)
      Issue.record("opened a missing file")
    } catch {
      #expect(error.errno == .noEntry)
      #expect(error.description.contains("/no/such/file"))
    }
  }

  @Test func inheritedDescriptorThatIsClosedIsRefused() {
    #expect(throws: SystemError.self) { _ = try OwnedFD.inherited(987) }
  }

  @Test func eventCountsSignalsAndDrainsToZero() throws {
    let event = try EventFD()
    checkEqual(event.drain(), 0)
    event.signal()
    event.signal()
    check(event.isSignalledNow())
    checkEqual(event.drain(), 2)
    check(!event.isSignalledNow())
  }

  @Test func drainNeverBlocksOnAnEventThatThePeerMadeBlocking() throws {
    let event = try EventFD()
    try event.fd.setNonBlocking(false)
    checkEqual(event.drain(), 0)
  }

  @Test func sealedMemoryCanNeitherShrinkNorGrow() throws {
    let memory = try SharedMemory.sealed(name: "test", byteCount: 8192)
    #expect(ftruncate(memory.rawValue, 4096) == -1)
    #expect(ftruncate(memory.rawValue, 16384) == -1)
    checkEqual(try memory.status().byteCount, 8192)
    #expect(SharedMemory.seals(of: memory) == SharedMemory.sizeSeals | (SharedMemory.seals(of: memory) ?? 0) & 0x20)
  }

  @Test func punchedHoleReadsAsZero() throws {
    let memory = try SharedMemory.sealed(name: "test", byteCount: 8192)
    let map = try MemoryMapping.shared(memory, byteCount: 8192)
    map.baseAddress.storeBytes(of: 0x55, as: UInt8.self)
    map.baseAddress.storeBytes(of: 0x66, toByteOffset: 4096, as: UInt8.self)
    try SharedMemory.punchHole(memory, offset: 0, byteCount: 4096)
    #expect(map.baseAddress.load(as: UInt8.self) == 0)
    #expect(map.baseAddress.load(fromByteOffset: 4096, as: UInt8.self) == 0x66)
  }
}

@Suite struct UnixSocketTests {
  @Test func descriptorsArriveWithTheirBytesAndUntakenOnesAreClosed() throws {
    let pair = try UnixSocket.pair(.stream)
    let a = try EventFD()
    let b = try EventFD()
    checkEqual(UnixSocket.send(pair.first, [1, 2, 3], descriptors: [a.fd.rawValue, b.fd.rawValue]), .bytes(3))
    var second: CInt = -1
    do {
      var reception = receive(pair.second)
      checkEqual(reception.transfer, .bytes(3))
      check(!reception.truncated)
      checkEqual(reception.descriptors.count, 2)
      let first = EventFD(adopting: try unwrap(reception.descriptors.takeFirst()))
      first.signal()
      checkEqual(a.drain(), 1)
      var rest = reception.descriptors
      second = try unwrap(rest.takeFirst()).release()
    }
    #expect(isOpen(second))
    close(second)
  }

  @Test func moreDescriptorsThanAllowedAreReportedAndNotLeaked() throws {
    let pair = try UnixSocket.pair(.stream)
    let name = "flood-\(UInt64.random(in: 0 ... .max))"
    let object = try SharedMemory.sealed(name: name, byteCount: 4096)
    checkEqual(UnixSocket.send(pair.first, [1], descriptors: Array(repeating: object.rawValue, count: 40)), .bytes(1))
    do {
      let reception = receive(pair.second, descriptorLimit: 8)
      check(reception.truncated)
      checkEqual(reception.descriptors.count, 8)
      checkEqual(descriptorCount(linkContaining: name), 9)
    }
    checkEqual(descriptorCount(linkContaining: name), 1)
  }

  @Test func emptySocketWouldBlockAndClosedPeerIsTheEnd() throws {
    let pair = try UnixSocket.pair(.stream)
    let nothing = receive(pair.second).transfer
    checkEqual(nothing, .wouldBlock)
    pair.split { first, second in
      close(first.release())
      let end = receive(second).transfer
      checkEqual(end, .end)
      checkEqual(UnixSocket.send(second, [1]), .failed(.brokenPipe))
    }
  }

  @Test func staleSocketFileIsReplacedAndALiveOneRefused() throws {
    let path = "/tmp/martlet-socket-\(getpid())-\(UInt32.random(in: 0 ... .max))"
    defer { unlink(path) }
    do { _ = try UnixSocket.listen(at: path) }
    let live = try UnixSocket.listen(at: path)
    #expect(throws: SystemError.self) { _ = try UnixSocket.listen(at: path) }
    let client = try UnixSocket.connect(to: path, timeout: .seconds(1))
    let server = try unwrap(try UnixSocket.accept(live))
    checkEqual(UnixSocket.send(client, [7]), .bytes(1))
    #expect(try UnixSocket.peer(of: server).pid == getpid())
  }
}

@Suite struct EventLoopTests {
  enum Token: Equatable { case kick(queue: Int), timer, signal }

  @Test func readyDescriptorsComeBackAsTokens() throws {
    var loop = try EventLoop<Token>()
    // A signal that another test has sent ends a wait as well.
    func next() throws -> [Token] {
      let deadline = MonotonicTime.now.advanced(by: .seconds(60))
      while MonotonicTime.now < deadline {
        let events = try loop.wait(timeout: .seconds(1))
        if !events.isEmpty { return events.map(\.token) }
      }
      return []
    }
    let kick = try EventFD()
    let timer = try Timer()
    try loop.add(kick.fd, for: .readable, token: .kick(queue: 3))
    try loop.add(timer.fd, for: .readable, token: .timer)
    check(try loop.wait(timeout: .zero).isEmpty)
    kick.signal()
    checkEqual(try next(), [.kick(queue: 3)])
    kick.drainAfterReport()
    timer.set(MonotonicTime.now.advanced(by: .milliseconds(5)))
    checkEqual(try next(), [.timer])
    timer.acknowledge()
    loop.remove(kick.fd)
    kick.signal()
    check(try loop.wait(timeout: .zero).isEmpty)
  }

  @Test func signalsArriveAsEvents() throws {
    let signals = try Signals.descriptor(for: [SIGUSR2])
    pthread_kill(pthread_self(), SIGUSR2)
    check(try signals.waitUntil(.readable, timeout: .seconds(1)))
    checkEqual(Signals.next(from: signals), SIGUSR2)
    checkEqual(Signals.next(from: signals), nil)
  }

  @Test func threadsRunTheirBodyOnce() throws {
    let done = try EventFD()
    let number = done.fd.rawValue
    let thread = try HostThread.start(name: "worker") {
      var one: UInt64 = 1
      _ = write(number, &one, 8)
    }
    thread.join()
    checkEqual(done.drain(), 1)
  }

  @Test func rateLimitLetsABurstThroughAndNoMoreUntilItsTimeIsOver() {
    var limit = RateLimit(burst: 3, per: .seconds(5))
    let start = MonotonicTime(nanoseconds: 10_000_000_000)
    let passed = (0..<5).map { _ in limit.allows(start) }
    #expect(passed == [true, true, true, false, false])
    check(limit.allows(start.advanced(by: .seconds(6))))
  }

  @Test func deadlinesSaturateInsteadOfWrapping() {
    #expect(MonotonicTime(nanoseconds: .max - 5).advanced(by: .seconds(1)).nanoseconds == .max)
    #expect(MonotonicTime(nanoseconds: 5).advanced(by: .seconds(-1)).nanoseconds == 0)
  }
}
