import CLinux
import Glibc
import HostSystem

/// Serves a disk over a Unix socket to any number of clients, in one thread.
final class NBDServer {
  private final class Client {
    let fd: OwnedFD
    var conversation: NBDConversation
    var sent = 0
    var jobCount = 0
    var isGone = false

    init(_ fd: consuming OwnedFD, _ export: NBDExport) {
      self.fd = fd
      conversation = NBDConversation(export)
    }
  }

  private let pump: BlockPump
  private let target: Target
  private let export: NBDExport
  private let path: String
  private let listener: OwnedFD
  private var clients: [Int: Client] = [:]
  private var clientCount = 0
  /// A client that has so much to answer is not read from.
  private static let mostJobs = 64
  private static let mostOutput = 64 << 20
  private static let mostClients = 64

  init(_ target: Target, path: String, name: String, readOnly: Bool) throws(ProbeError) {
    let pump = try BlockPump(target)
    var flags: NBDWire.TransmissionFlags = [.hasFlags, .dontFragment]
    // All clients share one queue, so what one flushes is flushed for all.
    flags.insert(.multipleConnections)
    if readOnly || pump.isReadOnly { flags.insert(.readOnly) }
    if pump.hasFlush { flags.formUnion([.flush, .forceUnitAccess]) }
    if !flags.contains(.readOnly) {
      if pump.hasDiscard { flags.insert(.trim) }
      if pump.hasWriteZeroes { flags.insert(.writeZeroes) }
    }
    export = NBDExport(name: name, byteCount: pump.byteCount, blockSize: pump.blockSize, flags: flags)
    listener = try wrapping { () throws(SystemError) in
      let listener = try UnixSocket.listen(at: path)
      try listener.setNonBlocking(true)
      return listener
    }
    self.pump = pump
    self.target = target
    self.path = path
  }

  deinit { _ = unsafe unlink(path) }

  /// Serves until interrupted, or, with `once`, until the last client has left.
  func run(_ interruption: Interruption, once: Bool) throws(ProbeError) {
    Output.error("martlet probe: serving \(export.byteCount) bytes; clients connect to nbd+unix:///\(export.name)?socket=\(path)")
    _ = try pump.collect()
    // Endless by purpose; every turn waits.
    while !interruption.isRequested {
      let keys = Array(clients.keys)
      var entries = [
        pollfd(fd: interruption.descriptor, events: Int16(POLLIN), revents: 0),
        pollfd(fd: listener.rawValue, events: clients.count < Self.mostClients ? Int16(POLLIN) : 0, revents: 0),
        pollfd(fd: pump.socket, events: Int16(POLLIN), revents: 0), pollfd(fd: pump.call, events: Int16(POLLIN), revents: 0),
      ]
      for key in keys { entries.append(pollfd(fd: clients[key]?.fd.rawValue ?? -1, events: interest(clients[key]), revents: 0)) }
      // SAFETY: the array is ours and has so many entries.
      _ = unsafe entries.withUnsafeMutableBufferPointer { unsafe poll($0.baseAddress, nfds_t($0.count), 1000) }
      if entries[2].revents != 0 { throw target.explaining(.unsuitable("The back end closed the connection")) }
      if entries[3].revents != 0 { pump.drainCalls() }
      for job in try pump.collect() {
        clients[job.owner]?.jobCount -= 1
        clients[job.owner]?.conversation.answer(job)
      }
      if entries[1].revents != 0 { accept() }
      for (key, entry) in zip(keys, entries.dropFirst(4)) where entry.revents & Int16(POLLIN | POLLHUP | POLLERR) != 0 {
        if let client = clients[key] { read(client) }
      }
      for (key, client) in clients { advance(key, client) }
      pump.start()
      for (key, client) in clients {
        write(client)
        if client.isGone || client.conversation.isOver && client.conversation.output.isEmpty && client.jobCount == 0 { leave(key, client) }
      }
      if once, clientCount > 0, clients.isEmpty { break }
      showProgress()
    }
    pump.finish()
    Output.error("martlet probe: served \(clientCount) clients and \(pump.requestCount) requests")
  }

  private var shown = MonotonicTime.now

  private func showProgress() {
    guard MonotonicTime.now.since(shown) >= .milliseconds(500) else { return }
    shown = .now
    Progress.show("\(clients.count) clients, \(pump.requestCount) requests")
  }

  private func interest(_ client: Client?) -> Int16 {
    guard let client else { return 0 }
    var events: Int16 = client.conversation.output.isEmpty ? 0 : Int16(POLLOUT)
    let isBusy = client.jobCount >= Self.mostJobs || client.conversation.output.count > Self.mostOutput
    if !isBusy, !client.conversation.isOver { events |= Int16(POLLIN) }
    return events
  }

  private func accept() {
    guard let fd = try? UnixSocket.accept(listener), (try? fd.setNonBlocking(true)) != nil else { return }
    clientCount += 1
    clients[clientCount] = Client(fd, export)
  }

  private func read(_ client: Client) {
    if client.conversation.isOver {
      client.isGone = true
      return
    }
    var buffer = [UInt8](repeating: 0, count: 1 << 18)
    // SAFETY: the buffer is ours and writable for its whole count.
    let transfer = unsafe buffer.withUnsafeMutableBytes { unsafe client.fd.read(into: $0) }
    switch transfer {
    case .bytes(let count): client.conversation.receive(buffer[..<count])
    case .wouldBlock: break
    case .end, .failed: client.isGone = true
    }
  }

  private func advance(_ key: Int, _ client: Client) {
    // Bounded by the count of jobs a client may have.
    while client.jobCount < Self.mostJobs, let request = client.conversation.next() {
      client.jobCount += 1
      pump.submit(
        BlockPump.Job(
          request.operation, offset: request.offset, byteCount: request.byteCount, data: request.data, flushesAfter: request.flushesAfter,
          owner: key, cookie: request.cookie))
    }
  }

  private func write(_ client: Client) {
    // Bounded: every turn sends something or ends.
    while client.sent < client.conversation.output.count {
      // SAFETY: the array is not changed during the call, and `sent` is below its count.
      let transfer = unsafe client.conversation.output.withUnsafeBytes {
        unsafe client.fd.write(UnsafeRawBufferPointer(rebasing: $0[client.sent...]))
      }
      switch transfer {
      case .bytes(let count): client.sent += count
      case .wouldBlock: return
      case .end, .failed:
        client.isGone = true
        return
      }
    }
    client.conversation.output.removeAll(keepingCapacity: client.sent < 4 << 20)
    client.sent = 0
  }

  private func leave(_ key: Int, _ client: Client) {
    if let complaint = client.conversation.complaint { Output.error("martlet probe: client \(key) was sent away: \(complaint)") }
    clients[key] = nil
  }
}
