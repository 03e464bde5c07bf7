import CLinux
import Glibc
import HostSystem

/// Storage by ordinary calls, for hosts without io_uring: `begin` does the whole request before it returns. Correct, and
/// one request at a time per queue.
@safe
package struct BlockingEngine: StorageEngine, ~Copyable {
  private let image: DiskImage
  private var watched: [(token: Int, entry: pollfd)] = []
  /// Tokens reported by the last turn and not taken yet.
  private var ready: [Int] = []

  package init(_ image: DiskImage) { self.image = image }

  package mutating func begin(_ slot: Int, _ request: StorageRequest) -> StorageOutcome? {
    var state = TransferState()
    if let outcome = state.begin(request, image) { return outcome }
    // Each round moves bytes, finishes a step, or uses up one of a bounded number of retries.
    while true {
      let result = perform(state)
      switch state.advance(result, image) {
      case .again: continue
      case .finished(let outcome): return outcome
      }
    }
  }

  private func perform(_ state: TransferState) -> Int {
    let fd = image.file.rawValue
    switch state.step {
    case .sync:
      return fdatasync(fd) == 0 ? 0 : -Int(Errno.current.rawValue)
    case .allocate(let mode):
      return Int(clinux_fallocate(fd, mode, Int(state.offset), Int(state.remaining)))
    case .transfer:
      // SAFETY: the requester keeps memory and pieces until completion.
      if let piece = unsafe state.nextPiece {
        var one = unsafe iovec(iov_base: piece.base, iov_len: piece.byteCount)
        return unsafe transfer(state, &one, 1)
      }
      guard let vectors = unsafe state.vectors else { preconditionFailure("A transfer has memory.") }
      return unsafe transfer(state, vectors, state.vectorCount)
    }
  }

  @unsafe
  private func transfer(_ state: TransferState, _ pieces: UnsafePointer<iovec>, _ count: Int) -> Int {
    let fd = image.file.rawValue
    if state.request.operation == .read {
      let result = unsafe preadv(fd, pieces, CInt(count), Int(state.offset))
      return result < 0 ? -Int(Errno.current.rawValue) : result
    }
    return unsafe clinux_pwritev2(fd, pieces, CInt(count), Int(state.offset), state.request.isDurable ? 2 : 0)  // RWF_DSYNC
  }

  package mutating func watch(_ fd: CInt, token: Int) {
    watched.append((token, pollfd(fd: fd, events: Int16(POLLIN), revents: 0)))
  }

  package mutating func unwatch(_ fd: CInt, token: Int) {
    watched.removeAll { $0.token == token }
    ready.removeAll { $0 == token }
  }

  package mutating func turn(waiting: Bool) {
    guard waiting, ready.isEmpty else { return }
    var entries = watched.map(\.entry)
    // SAFETY: the array is not changed during the call.
    let count = unsafe poll(&entries, nfds_t(entries.count), -1)
    guard count > 0 else { return }
    for (index, entry) in entries.enumerated() where entry.revents != 0 {
      // Taken here, because the kernel would report it for ever.
      var value: UInt64 = 0
      if entry.revents & Int16(POLLIN) != 0 { _ = unsafe read(entry.fd, &value, 8) }
      ready.append(watched[index].token)
    }
  }

  package mutating func nextEvent() -> StorageEvent? {
    ready.isEmpty ? nil : .readable(token: ready.removeFirst())
  }
}
