import CLinux
import Glibc
import HostSystem
import VirtioSpec

/// Where frames go to and come from: a tap interface, or a socket of packets (`SOCK_SEQPACKET`) whose peer speaks as a tap
/// does. In both a packet is a 12-byte virtio header, little-endian, and a frame. Non-blocking.
package final class PacketPort {
  package enum Kind: Equatable, Sendable {
    case tap(String)
    /// For tests, measurements and programs that do without a tap.
    case socket
  }

  /// What a transmission came to.
  package enum Sent: Equatable, Sendable {
    case sent
    /// The other side takes nothing now; the same frame may be tried again when the port is writable.
    case wouldBlock
    /// This frame was refused (a tap that is down, say); the next one may not be.
    case refused(Errno)
    /// There is no other side any more.
    case gone
  }

  package enum Received: Equatable, Sendable {
    /// So many bytes, with the header. When more than there was room for, the rest is lost.
    case packet(Int)
    case empty
    case gone
  }

  package let kind: Kind
  let fd: OwnedFD

  package init(tap: consuming TapDevice) {
    kind = .tap(tap.name)
    fd = tap.takeFD()
  }

  /// - Throws: what makes the descriptor unfit.
  package static func socket(_ fd: consuming OwnedFD) throws(SystemError) -> PacketPort {
    var type: CInt = 0
    var size = socklen_t(MemoryLayout<CInt>.size)
    // SAFETY: both are ours and alive for the call.
    if unsafe getsockopt(fd.rawValue, SOL_SOCKET, SO_TYPE, &type, &size) < 0 {
      throw SystemError("use descriptor \(fd.rawValue) as a packet socket", Errno.current)
    }
    // Datagram sockets keep boundaries too, but do not tell when the peer is gone.
    guard type == CInt(SOCK_SEQPACKET.rawValue) else {
      throw SystemError("use descriptor \(fd.rawValue) as a packet socket, it is not SOCK_SEQPACKET", .invalid)
    }
    try fd.setNonBlocking(true)
    return PacketPort(fd)
  }

  private init(_ socket: consuming OwnedFD) {
    kind = .socket
    fd = socket
  }

  /// Tells a tap what it may leave to the driver. A socket's peer is not told; frames that need more are dropped.
  package func setOffloads(_ offloads: ReceiveOffloads) throws(SystemError) {
    guard case .tap(let name) = kind else { return }
    var flags: TapDevice.Offloads = []
    if offloads.contains(.checksum) { flags.insert(.checksum) }
    if offloads.contains(.tso4) { flags.insert(.tso4) }
    if offloads.contains(.tso6) { flags.insert(.tso6) }
    if offloads.contains(.ecn) { flags.insert(.ecn) }
    _ = try checked(clinux_tun_set_offload(fd.rawValue, flags.rawValue), "set the offloads of tap \(name)")
  }

  /// Sends one packet gathered from `parts`, the first of which is the header.
  @unsafe
  package func send(_ parts: UnsafeMutableBufferPointer<iovec>) -> Sent {
    // Repeats only while a signal interrupts.
    while true {
      // SAFETY: the caller owns the array; the pieces lie in private memory or in guest memory that it holds.
      let result = unsafe writev(fd.rawValue, parts.baseAddress, CInt(parts.count))
      if result >= 0 { return .sent }
      let error = Errno.current
      switch error {
      case .interrupted: continue
      case .again: return .wouldBlock
      case .brokenPipe, .connectionReset, Errno(EBADFD), Errno(ENOTCONN): return .gone
      default: return .refused(error)
      }
    }
  }

  /// Receives one packet, scattered over `parts`.
  @unsafe
  package func receive(_ parts: UnsafeMutableBufferPointer<iovec>) -> Received {
    // Repeats only while a signal interrupts.
    while true {
      // SAFETY: as in `send`.
      let result = unsafe readv(fd.rawValue, parts.baseAddress, CInt(parts.count))
      if result > 0 { return .packet(result) }
      if result == 0 { return .gone }
      let error = Errno.current
      switch error {
      case .interrupted: continue
      case .again: return .empty
      default: return .gone
      }
    }
  }
}
