import Foundation
import HostSystem
import NetDevice
import TestSupport
import Testing
import VirtioQueue
import VirtioSpec

/// A card on a real tap in a network namespace of its own, and sockets of the host's in that namespace.
final class TapRig {
  static let guestMAC: [UInt8] = [2, 0, 0, 0, 0, 2]
  static let hostMAC: [UInt8] = [2, 0, 0, 0, 0, 1]

  let net: DriverSide
  let udp: CInt
  let tcp: CInt
  private let thread: HostThread

  static var isPossible: Bool {
    geteuid() == 0 && access("/dev/net/tun", R_OK | W_OK) == 0 && access("/usr/sbin/ip", X_OK) == 0
  }

  private final class Sockets: @unchecked Sendable {
    var udp: CInt = -1
    var tcp: CInt = -1
    let ready = DispatchSemaphore(value: 0)
  }

  init(wanting: (FeatureSet) -> FeatureSet = { $0.subtracting(.packedRing) }) throws {
    let vhost = try UnixSocket.pair(.stream)
    let number = try vhost.second.duplicate().release()
    let sockets = Sockets()
    // Namespaces belong to threads: the card's thread leaves the host's, and what it starts and opens is in its own.
    thread = try HostThread.start(name: "card", stackSize: 1 << 20) {
      guard TapRig.leaveNetwork() else {
        sockets.ready.signal()
        return
      }
      for command in [
        "tuntap add dev t0 mode tap", "link set t0 address 02:00:00:00:00:01", "addr add 10.9.0.1/24 dev t0", "link set t0 up",
        "link set lo up", "neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev t0",
      ] { TapRig.ip(command) }
      sockets.udp = TapRig.socket(SOCK_DGRAM, 7777)
      sockets.tcp = TapRig.socket(SOCK_STREAM, 7778)
      listen(sockets.tcp, 4)
      sockets.ready.signal()
      _ = NetProgram.run(["martlet-net", "--fd=\(number)", "--tap=t0"])
    }
    _ = sockets.ready.wait(timeout: .now() + 10)
    udp = sockets.udp
    tcp = sockets.tcp
    check(udp >= 0 && tcp >= 0, "The namespace was made")
    net = try DriverSide(TestFrontEnd(vhost.first.duplicate(), memoryByteCount: 64 << 20, wanting: wanting))
  }

  deinit {
    net.close()
    thread.join()
    close(udp)
    close(tcp)
  }

  /// `unshare(CLONE_NEWNET)`, which Glibc's module does not declare.
  private static func leaveNetwork() -> Bool {
    typealias Unshare = @convention(c) (CInt) -> CInt
    guard let symbol = dlsym(nil, "unshare") else { return false }
    return unsafeBitCast(symbol, to: Unshare.self)(0x4000_0000) == 0
  }

  private static func ip(_ command: String) {
    // Not Foundation's Process: it waits in ways of its own, which a bare thread does not offer.
    let words = ["ip"] + command.split(separator: " ").map(String.init)
    var arguments = words.map { strdup($0) } + [nil]
    defer { for argument in arguments { free(argument) } }
    var child: pid_t = 0
    var status: CInt = -1
    if posix_spawn(&child, "/usr/sbin/ip", nil, nil, &arguments, nil) == 0 { waitpid(child, &status, 0) }
    check(status == 0, "ip \(command)")
  }

  private static func socket(_ type: __socket_type, _ port: UInt16) -> CInt {
    let fd = Glibc.socket(AF_INET, CInt(type.rawValue), 0)
    var address = sockaddr_in(
      sin_family: sa_family_t(AF_INET), sin_port: port.bigEndian, sin_addr: in_addr(s_addr: UInt32(0x0A09_0001).bigEndian),
      sin_zero: (0, 0, 0, 0, 0, 0, 0, 0))
    let result = withUnsafePointer(to: &address) {
      $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { bind(fd, $0, socklen_t(MemoryLayout<sockaddr_in>.size)) }
    }
    check(result == 0, "bound")
    return fd
  }

  // MARK: The guest's packets

  static func sum(_ bytes: some Collection<UInt8>, _ start: UInt32 = 0) -> UInt32 {
    var sum = start
    var high = true
    for byte in bytes {
      sum &+= high ? UInt32(byte) << 8 : UInt32(byte)
      high.toggle()
    }
    while sum >> 16 != 0 { sum = sum & 0xFFFF &+ sum >> 16 }
    return sum
  }

  static func pair(_ value: Int) -> [UInt8] { [UInt8(value >> 8 & 0xFF), UInt8(value & 0xFF)] }
  static func quad(_ value: UInt32) -> [UInt8] { (0..<4).map { UInt8(truncatingIfNeeded: value >> (24 - 8 * $0)) } }

  static let addresses: [UInt8] = [10, 9, 0, 2, 10, 9, 0, 1]

  /// An IPv4 packet in a frame; the sum of the pseudo header stands where the transport's checksum belongs, as for NEEDS_CSUM.
  static func frame(_ proto: UInt8, _ segment: [UInt8], checksumOffset: Int) -> [UInt8] {
    var ip: [UInt8] = [0x45, 0] + pair(20 + segment.count) + [0, 1, 0x40, 0, 64, proto, 0, 0] + addresses
    ip.replaceSubrange(10..<12, with: pair(Int(~sum(ip) & 0xFFFF)))
    var segment = segment
    let pseudo = sum(addresses + [0, proto] + pair(segment.count))
    segment.replaceSubrange(checksumOffset..<checksumOffset + 2, with: pair(Int(pseudo)))
    return hostMAC + guestMAC + [8, 0] + ip + segment
  }

  static func tcpSegment(_ port: Int, seq: UInt32, ack: UInt32, flags: UInt8, _ payload: [UInt8] = []) -> [UInt8] {
    pair(port) + pair(7778) + quad(seq) + quad(ack) + [0x50, flags, 0xFF, 0xFF, 0, 0, 0, 0] + payload
  }

  static func needsChecksum(offset: UInt16) -> NetHeader {
    var header = NetHeader()
    header.flags = NetHeader.needsChecksum
    header.checksumStart = 34
    header.checksumOffset = offset
    return header
  }

  /// The next TCP packet for the guest; others (ARP, IPv6 noise of the kernel) are passed over.
  func takeTCP() throws -> (header: NetHeader, frame: [UInt8], seq: UInt32, ack: UInt32, flags: UInt8, payload: [UInt8]) {
    for _ in 0..<50 {
      while net.offered.count < 4 { try net.offer([65_600]) }
      let (header, frame, _) = try net.take()
      guard frame.count >= 54, frame[12] == 8, frame[13] == 0, frame[23] == 6 else { continue }
      func number(_ offset: Int) -> UInt32 { frame[offset..<offset + 4].reduce(0) { $0 << 8 | UInt32($1) } }
      let total = Int(frame[16]) << 8 | Int(frame[17])
      let start = 34 + Int(frame[46] >> 4) * 4
      let end = total == 0 ? frame.count : min(frame.count, 14 + total)
      return (header, frame, number(38), number(42), frame[47], Array(frame[start..<max(start, end)]))
    }
    throw TestFailure("no TCP packet came")
  }
}

@Suite(.serialized, .enabled(if: TapRig.isPossible, "Taps need root, /dev/net/tun and the ip command"))
struct TapTests {
  @Test func aChecksumTheDriverLeftOpenCountsAsGoodAndAWrongOneDoesNot() throws {
    let rig = try TapRig()
    func datagram(_ text: String) -> [UInt8] {
      TapRig.frame(
        17, TapRig.pair(5000) + TapRig.pair(7777) + TapRig.pair(8 + text.utf8.count) + [0, 0] + Array(text.utf8), checksumOffset: 6)
    }
    // The sum of the pseudo header alone is wrong as a finished checksum.
    try rig.net.send(NetHeader(), datagram("wrong"))
    try rig.net.send(TapRig.needsChecksum(offset: 6), datagram("right"))
    var bytes = [UInt8](repeating: 0, count: 100)
    var timeout = timeval(tv_sec: 5, tv_usec: 0)
    setsockopt(rig.udp, SOL_SOCKET, SO_RCVTIMEO, &timeout, socklen_t(MemoryLayout<timeval>.size))
    let count = recv(rig.udp, &bytes, 100, 0)
    check(count == 5, "recv gave \(count)")
    checkEqual(String(decoding: bytes.prefix(5), as: UTF8.self), "right")
  }

  /// Connects as a guest would; the host's socket and the numbers to go on with.
  private func connect(_ rig: TapRig, mss: Bool = true) throws -> (socket: CInt, seq: UInt32, ack: UInt32) {
    var syn = TapRig.tcpSegment(4000, seq: 1000, ack: 0, flags: 2)
    syn[12] = 0x60
    syn += [2, 4] + TapRig.pair(1460)
    try rig.net.send(TapRig.needsChecksum(offset: 16), TapRig.frame(6, syn, checksumOffset: 16))
    let answer = try rig.takeTCP()
    checkEqual(answer.flags, 0x12)
    checkEqual(answer.ack, 1001)
    let ack = answer.seq &+ 1
    try rig.net.send(
      TapRig.needsChecksum(offset: 16),
      TapRig.frame(6, TapRig.tcpSegment(4000, seq: 1001, ack: ack, flags: 0x10), checksumOffset: 16))
    var timeout = timeval(tv_sec: 5, tv_usec: 0)
    setsockopt(rig.tcp, SOL_SOCKET, SO_RCVTIMEO, &timeout, socklen_t(MemoryLayout<timeval>.size))
    let socket = accept(rig.tcp, nil, nil)
    check(socket >= 0, "accepted")
    return (socket, 1001, ack)
  }

  @Test func oneBigSegmentOfTheDriversArrivesAtAHostSocket() throws {
    let rig = try TapRig()
    let (socket, seq, ack) = try connect(rig)
    defer { close(socket) }
    let payload = (0..<30_000).map { UInt8(truncatingIfNeeded: $0 &* 13 >> 2) }
    var header = TapRig.needsChecksum(offset: 16)
    header.gsoType = NetHeader.gsoTCPv4
    header.gsoSize = 1448
    header.headerLength = 54
    try rig.net.send(
      header, TapRig.frame(6, TapRig.tcpSegment(4000, seq: seq, ack: ack, flags: 0x18, payload), checksumOffset: 16))
    var timeout = timeval(tv_sec: 5, tv_usec: 0)
    setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &timeout, socklen_t(MemoryLayout<timeval>.size))
    var seen = [UInt8](repeating: 0, count: payload.count)
    let count = recv(socket, &seen, seen.count, CInt(MSG_WAITALL))
    checkEqual(count, payload.count)
    check(seen == payload)
  }

  /// Receives what a host socket writes, acknowledging; the frames it came in.
  private func download(_ rig: TapRig, _ count: Int) throws -> (payload: [UInt8], frames: [(header: NetHeader, frame: [UInt8])]) {
    let (socket, seq, start) = try connect(rig)
    defer { close(socket) }
    let sent = (0..<count).map { UInt8(truncatingIfNeeded: $0 &* 11 >> 3) }
    let writer = try HostThread.start(name: "writer") { _ = sent.withUnsafeBytes { write(socket, $0.baseAddress, $0.count) } }
    defer { writer.join() }
    var payload: [UInt8] = []
    var frames: [(header: NetHeader, frame: [UInt8])] = []
    while payload.count < count {
      let packet = try rig.takeTCP()
      guard !packet.payload.isEmpty, packet.seq == start &+ UInt32(payload.count) else { continue }
      payload += packet.payload
      frames.append((packet.header, packet.frame))
      try rig.net.send(
        TapRig.needsChecksum(offset: 16),
        TapRig.frame(6, TapRig.tcpSegment(4000, seq: seq, ack: start &+ UInt32(payload.count), flags: 0x10), checksumOffset: 16))
    }
    check(payload == sent)
    return (payload, frames)
  }

  @Test func aDriverThatCanGetsBigSegmentsWithOpenChecksums() throws {
    let rig = try TapRig()
    let (_, frames) = try download(rig, 200_000)
    let big = frames.filter { $0.frame.count > 1514 }
    check(!big.isEmpty, "No frame was larger than the MTU")
    for (header, _) in big {
      checkEqual(header.gsoType & ~NetHeader.gsoECN, NetHeader.gsoTCPv4)
      check(header.gsoSize <= 1460 && header.gsoSize > 500)
      checkEqual(header.flags, NetHeader.needsChecksum)
      checkEqual(header.checksumStart, 34)
      checkEqual(header.checksumOffset, 16)
    }
  }

  @Test func aDriverThatCannotGetsOrdinaryFramesWithFinishedChecksums() throws {
    let rig = try TapRig(wanting: {
      $0.subtracting([.packedRing, .netGuestChecksum, .netGuestTSO4, .netGuestTSO6, .netGuestECN])
    })
    let (_, frames) = try download(rig, 200_000)
    for (header, frame) in frames {
      check(frame.count <= 1514)
      checkEqual(header.flags, 0)
      checkEqual(header.gsoType, 0)
      let total = Int(frame[16]) << 8 | Int(frame[17])
      let segment = Array(frame[34..<14 + total])
      let addresses = Array(frame[26..<34])
      checkEqual(TapRig.sum(segment, TapRig.sum(addresses + [0, 6] + TapRig.pair(segment.count))), 0xFFFF)
    }
  }
}
