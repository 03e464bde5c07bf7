import CLinux
import Glibc
import HostSystem
import Synchronization
import TestSupport
import Testing

/// A peer that shares an eventfd's description makes it blocking and full, or empties it at the worst moment.
@Suite(.serialized) struct WaitBreakerTests {
  private final class Shared: Sendable {
    let event: EventFD
    let rounds = Atomic<Int>(0)
    let isOver = Atomic<Bool>(false)
    init() throws { event = try EventFD() }

    func makeBlocking() {
      let flags = clinux_fcntl(event.fd.rawValue, F_GETFL, 0)
      _ = clinux_fcntl(event.fd.rawValue, F_SETFL, CLong(flags & ~O_NONBLOCK))
    }

    func fill() {
      var most = UInt64.max - 1
      _ = write(event.fd.rawValue, &most, 8)
    }
  }

  private func eventually(_ what: Comment, _ condition: () -> Bool) {
    waitWhile { !condition() }
    #expect(condition(), what)
  }

  @Test func aProtectedThreadComesBackFromAFullCounterThatBlocks() throws {
    let shared = try Shared()
    shared.fill()
    shared.makeBlocking()
    let thread = try HostThread.start(name: "protected") {
      guard (try? WaitBreaker.protectThisThread()) != nil else { return }
      for _ in 0..<20 {
        shared.event.signalDistrusted()
        shared.rounds.add(1, ordering: .relaxed)
      }
      // The timer has to stop, and to start again.
      usleep(50_000)
      usleep(50_000)
      shared.event.signalDistrusted()
      shared.isOver.store(true, ordering: .relaxed)
    }
    eventually("it never came back") { shared.isOver.load(ordering: .relaxed) }
    checkEqual(shared.rounds.load(ordering: .relaxed), 20)
    // Nothing was added: it was full all the time.
    checkEqual(shared.event.drain(), UInt64.max - 1)
    thread.join()
  }

  @Test func raceAgainstAPeerThatFillsAndEmptiesIsNeverLost() throws {
    let shared = try Shared()
    shared.makeBlocking()
    let writer = try HostThread.start(name: "protected") {
      guard (try? WaitBreaker.protectThisThread()) != nil else { return }
      for _ in 0..<2000 {
        shared.event.signalDistrusted()
        _ = shared.event.drain()
      }
      shared.isOver.store(true, ordering: .relaxed)
    }
    let peer = try HostThread.start(name: "peer") {
      var most = UInt64.max - 1
      var value: UInt64 = 0
      while !shared.isOver.load(ordering: .relaxed) {
        // Where it waits itself, the writer's next turn or this test's end lets it go.
        if !shared.event.isSignalledNow() { _ = write(shared.event.fd.rawValue, &most, 8) }
        if shared.event.isSignalledNow() { _ = read(shared.event.fd.rawValue, &value, 8) }
      }
    }
    eventually("the writer hangs") { shared.isOver.load(ordering: .relaxed) }
    writer.join()
    // Whatever the peer waits in is let go: a write by room, a read by a count.
    for _ in 0..<3 {
      shared.event.drain()
      usleep(20_000)
      if shared.event.hasRoomNow() { shared.event.signal() }
      usleep(20_000)
    }
    peer.join()
  }

  @Test func aThreadThatIsNotProtectedAsksFirst() throws {
    let shared = try Shared()
    shared.fill()
    shared.makeBlocking()
    shared.event.signalDistrusted()
    checkEqual(shared.event.drain(), UInt64.max - 1)
    checkEqual(shared.event.drain(), 0)
  }
}
