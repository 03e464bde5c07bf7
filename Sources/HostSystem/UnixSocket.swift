import CLinux
import Glibc

/// Descriptors that came with a message and have not been taken yet; those left over are closed.
@safe
public struct ReceivedDescriptors: ~Copyable {
  /// Most descriptors one message may carry here; a peer that sends more is refused (`truncated`).
  public static var capacity: Int { 32 }

  private var numbers: [CInt]

  init(_ numbers: [CInt]) { self.numbers = numbers }
  public init() { numbers = [] }

  deinit { for number in numbers { _ = close(number) } }

  public var count: Int { numbers.count }
  public var isEmpty: Bool { numbers.isEmpty }

  /// The first descriptor still here, now the caller's.
  public mutating func takeFirst() -> OwnedFD? {
    numbers.isEmpty ? nil : OwnedFD(owning: numbers.removeFirst())
  }

  /// Moves everything of `other` behind what is here.
  public mutating func append(_ other: consuming ReceivedDescriptors) {
    while let fd = other.takeFirst() { numbers.append(fd.release()) }
  }

  public mutating func closeAll() {
    for number in numbers { _ = close(number) }
    numbers.removeAll()
  }
}

/// What a receive came to.
@frozen public struct Reception: ~Copyable {
  public let transfer: Transfer
  public var descriptors: ReceivedDescriptors
  /// Payload or descriptors did not fit and were dropped by the kernel: treat the peer as broken.
  public let truncated: Bool
}

/// Unix-domain sockets with descriptor passing (`unix(7)`), always close-on-exec.
public enum UnixSocket {
  public enum Kind: Sendable {
    case stream
    /// Message boundaries kept, connection-oriented.
    case sequencedPacket

    var rawValue: CInt { self == .stream ? CInt(SOCK_STREAM.rawValue) : CInt(SOCK_SEQPACKET.rawValue) }
  }

  private static var flags: CInt { CInt(SOCK_CLOEXEC.rawValue) }
  private static var dontWait: CInt { CInt(MSG_DONTWAIT) }

  /// Two connected sockets, blocking.
  public static func pair(_ kind: Kind) throws(SystemError) -> SocketPair {
    var numbers: (CInt, CInt) = (-1, -1)
    // SAFETY: a homogeneous tuple of two CInt is laid out as an array of two.
    let result = unsafe withUnsafeMutableBytes(of: &numbers) { raw in
      unsafe socketpair(AF_UNIX, kind.rawValue | flags, 0, raw.assumingMemoryBound(to: CInt.self).baseAddress)
    }
    if result < 0 { throw SystemError("make a socket pair", Errno.current) }
    return SocketPair(OwnedFD(owning: numbers.0), OwnedFD(owning: numbers.1))
  }

  private static func make(_ kind: Kind) throws(SystemError) -> OwnedFD {
    let result = socket(AF_UNIX, kind.rawValue | flags, 0)
    if result < 0 { throw SystemError("make a socket", Errno.current) }
    return OwnedFD(owning: result)
  }

  /// A listening socket at `path`. A stale socket file (nobody listens) is replaced; a live one is refused with `EADDRINUSE`.
  public static func listen(at path: String, _ kind: Kind = .stream, mode: UInt32 = 0o600) throws(SystemError) -> OwnedFD {
    let fd = try make(kind)
    let oldMask = umask(0o777 & ~mode)
    defer { _ = umask(oldMask) }
    // SAFETY: the path is a NUL-terminated copy that lives for the call.
    var result = unsafe clinux_unix_bind(fd.rawValue, path)
    if result == -EADDRINUSE, isStaleSocket(path, kind) {
      _ = unsafe unlink(path)
      result = unsafe clinux_unix_bind(fd.rawValue, path)
    }
    _ = try checked(result, "listen on \(path)")
    if Glibc.listen(fd.rawValue, 16) < 0 {
      let error = SystemError("listen on \(path)", Errno.current)
      _ = unsafe unlink(path)
      throw error
    }
    return fd
  }

  private static func isStaleSocket(_ path: String, _ kind: Kind) -> Bool {
    // O_PATH and O_NOFOLLOW (asm-generic/fcntl.h): a link is not looked behind, and connecting to a file that is no socket is
    // refused the same way as to a socket nobody listens at.
    guard let file = try? OwnedFD.open(path, 0o10000000 | 0o400000), (try? file.status().kind) == .socket,
      let probe = try? make(kind)
    else { return false }
    return unsafe clinux_unix_connect(probe.rawValue, path) == -ECONNREFUSED
  }

  /// Connects, waiting at most as long as the kernel lets a Unix connect wait (a full backlog blocks; see `timeout`).
  public static func connect(to path: String, _ kind: Kind = .stream, timeout: Duration? = nil) throws(SystemError) -> OwnedFD {
    let fd = try make(kind)
    if let timeout {
      var time = timeval(tv_sec: Int(timeout.nanoseconds / 1_000_000_000), tv_usec: Int(timeout.nanoseconds % 1_000_000_000 / 1000))
      // SO_SNDTIMEO also bounds connect(2) on a Unix socket whose backlog is full.
      // SAFETY: `time` is ours and alive for the call.
      _ = unsafe setsockopt(fd.rawValue, SOL_SOCKET, SO_SNDTIMEO, &time, socklen_t(MemoryLayout<timeval>.size))
    }
    // SAFETY: the path is a NUL-terminated copy that lives for the call.
    let result = retrying { unsafe clinux_unix_connect(fd.rawValue, path) }
    if result == -EAGAIN { throw SystemError("connect to \(path)", .timedOut) }
    _ = try checked(result, "connect to \(path)")
    if timeout != nil {
      var none = timeval()
      _ = unsafe setsockopt(fd.rawValue, SOL_SOCKET, SO_SNDTIMEO, &none, socklen_t(MemoryLayout<timeval>.size))
    }
    return fd
  }

  /// The next connection of a listening socket, or nil when none is waiting (non-blocking listeners).
  public static func accept(_ listener: borrowing OwnedFD) throws(SystemError) -> OwnedFD? {
    let result = clinux_accept(listener.rawValue)
    if result < 0 {
      let error = Errno(-result)
      if error == .again || error == .interrupted || error == Errno(ECONNABORTED) { return nil }
      throw SystemError("accept a connection", error)
    }
    return OwnedFD(owning: result)
  }

  /// One `sendmsg`: bytes with descriptors riding on the first of them. Never raises SIGPIPE.
  public static func send(
    _ socket: borrowing OwnedFD, _ bytes: UnsafeRawBufferPointer, descriptors: [CInt] = [], waiting: Bool = true
  ) -> Transfer {
    // SAFETY: sendmsg only reads the buffer; the descriptor array lives for the call.
    var part = unsafe iovec(iov_base: UnsafeMutableRawPointer(mutating: bytes.baseAddress), iov_len: bytes.count)
    while true {
      let result = unsafe descriptors.withUnsafeBufferPointer { numbers in
        unsafe clinux_send_with_fds(
          socket.rawValue, &part, 1, numbers.baseAddress, CInt(numbers.count), waiting ? 0 : dontWait)
      }
      if result >= 0 { return .bytes(result) }
      if result == -Int(EINTR) { continue }
      return result == -Int(EAGAIN) ? .wouldBlock : .failed(Errno(CInt(-result)))
    }
  }

  public static func send(_ socket: borrowing OwnedFD, _ bytes: [UInt8], descriptors: [CInt] = [], waiting: Bool = true) -> Transfer {
    unsafe bytes.withUnsafeBytes { unsafe send(socket, $0, descriptors: descriptors, waiting: waiting) }
  }

  /// One `recvmsg` with `MSG_CMSG_CLOEXEC`; at most `descriptorLimit` descriptors are accepted with it.
  public static func receive(
    _ socket: borrowing OwnedFD, into buffer: UnsafeMutableRawBufferPointer, descriptorLimit: Int = ReceivedDescriptors.capacity,
    waiting: Bool = false
  ) -> Reception {
    var numbers = [CInt](repeating: -1, count: max(1, min(descriptorLimit, 253)))
    var count: CInt = 0
    var truncated: CInt = 0
    while true {
      // SAFETY: the buffer is the caller's; at most `descriptorLimit` numbers are stored.
      let result = unsafe numbers.withUnsafeMutableBufferPointer { slots in
        unsafe clinux_receive_with_fds(
          socket.rawValue, buffer.baseAddress, buffer.count, slots.baseAddress, CInt(min(descriptorLimit, 253)), &count, &truncated,
          waiting ? 0 : dontWait)
      }
      let descriptors = ReceivedDescriptors(Array(numbers[..<Int(count)]))
      if result == -Int(EINTR) { continue }
      let transfer: Transfer =
        result > 0 ? .bytes(result) : result == 0 ? .end : result == -Int(EAGAIN) ? .wouldBlock : .failed(Errno(CInt(-result)))
      return Reception(transfer: transfer, descriptors: descriptors, truncated: truncated != 0)
    }
  }

  /// What waits in a socket, at most so many bytes, without taking it out. Descriptors among it are not looked at.
  public static func peek(_ socket: borrowing OwnedFD, limit: Int) -> [UInt8] {
    var buffer = [UInt8](repeating: 0, count: limit)
    var count: CInt = 0
    var truncated: CInt = 0
    // SAFETY: the buffer is lent for the call; no descriptor is asked for.
    let result = unsafe buffer.withUnsafeMutableBytes { bytes in
      unsafe clinux_receive_with_fds(
        socket.rawValue, bytes.baseAddress, bytes.count, nil, 0, &count, &truncated, CInt(MSG_PEEK) | dontWait)
    }
    return result > 0 ? Array(buffer[..<result]) : []
  }

  /// Who is at the other end of a connected socket (`SO_PEERCRED`).
  public static func peer(of socket: borrowing OwnedFD) throws(SystemError) -> (pid: Int32, uid: UInt32, gid: UInt32) {
    var pid: CInt = 0
    var uid: CUnsignedInt = 0
    var gid: CUnsignedInt = 0
    _ = try checked(unsafe clinux_peer_credentials(socket.rawValue, &pid, &uid, &gid), "read the peer's credentials")
    return (pid, uid, gid)
  }
}

/// Both ends of a socket pair, each to be taken once.
@frozen public struct SocketPair: ~Copyable {
  public let first: OwnedFD
  public let second: OwnedFD

  init(_ first: consuming OwnedFD, _ second: consuming OwnedFD) {
    self.first = first
    self.second = second
  }

  /// Hands out both ends.
  public consuming func split<R: ~Copyable, E: Error>(
    _ body: (consuming OwnedFD, consuming OwnedFD) throws(E) -> R
  ) throws(E) -> R {
    try body(first, second)
  }
}
