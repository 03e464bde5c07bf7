import Foundation
import HostSystem
import NetDevice
import TestSupport
import Testing
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// Both sides of a card: the program's own code in a thread, a driver at its queues, a peer at its packet socket.
final class NetRig: DriverSide {
  /// The peer's end of the packet socket.
  let peer: OwnedFD
  private let thread: HostThread

  init(
    size: UInt16 = 128, memory: UInt64 = 64 << 20, arguments: [String] = [],
    wanting: (FeatureSet) -> FeatureSet = { $0.subtracting(.packedRing) }
  ) throws {
    let vhost = try UnixSocket.pair(.stream)
    let packets = try UnixSocket.pair(.sequencedPacket)
    let vhostNumber = try vhost.second.duplicate().release()
    let packetNumber = try packets.second.duplicate().release()
    peer = try packets.first.duplicate()
    thread = try HostThread.start(name: "card", stackSize: 1 << 20) {
      _ = NetProgram.run(["martlet-net", "--fd=\(vhostNumber)", "--packet-fd=\(packetNumber)"] + arguments)
    }
    try super.init(TestFrontEnd(vhost.first.duplicate(), memoryByteCount: memory, wanting: wanting), size: size)
  }

  deinit {
    close()
    thread.join()
  }

  // MARK: Peer

  func peerSend(_ frame: [UInt8]) throws { try peerSend(NetHeader(), frame) }

  func peerSend(_ header: NetHeader, _ frame: [UInt8]) throws {
    let packet = DriverSide.bytes(header) + frame
    let sent = packet.withUnsafeBytes { write(peer.rawValue, $0.baseAddress, $0.count) }
    checkEqual(sent, packet.count)
  }

  /// The next packet at the peer; nil when none comes.
  func peerTake(within limit: Duration = .seconds(5)) throws -> (header: NetHeader, frame: [UInt8])? {
    guard try peer.waitUntil(.readable, timeout: limit) else { return nil }
    var packet = [UInt8](repeating: 0, count: 80_000)
    let count = packet.withUnsafeMutableBytes { read(peer.rawValue, $0.baseAddress, $0.count) }
    guard count >= 12 else { return nil }
    return (DriverSide.header(packet), Array(packet[12..<count]))
  }
}

/// A driver at the queues of a card.
class DriverSide {
  let front: TestFrontEnd
  let receive: TestQueue
  let transmit: TestQueue

  init(_ front: TestFrontEnd, size: UInt16 = 128) throws {
    self.front = front
    receive = try front.startQueue(size: size)
    transmit = try front.startQueue(size: size)
  }

  /// The front end leaves.
  func close() { shutdown(front.frontEnd.socketNumber, CInt(SHUT_RDWR)) }

  // MARK: Driver

  /// Guest memory with these bytes.
  func place(_ bytes: [UInt8]) -> GuestAddress {
    let address = front.allocate(max(1, bytes.count), alignment: 1)
    check(front.memory.copyIn(bytes, at: address))
    return address
  }

  /// Transmits header and frame in pieces of the given sizes (the last takes the rest) and waits until it is used.
  func send(_ frame: [UInt8], pieces: [Int] = [], indirect: Bool = false) throws {
    try send(NetHeader(), frame, pieces: pieces, indirect: indirect)
  }

  func send(_ header: NetHeader, _ frame: [UInt8], pieces: [Int] = [], indirect: Bool = false) throws {
    try sendRaw(DriverSide.bytes(header) + frame, pieces: pieces, indirect: indirect)
  }

  func sendRaw(_ packet: [UInt8], pieces: [Int] = [], indirect: Bool = false) throws {
    var buffers: [DriverBuffer] = []
    var rest = packet[...]
    for size in pieces where !rest.isEmpty {
      let piece = rest.prefix(size)
      buffers.append(DriverBuffer(place(Array(piece)), UInt32(piece.count), isDeviceWritable: false))
      rest = rest.dropFirst(size)
    }
    if !rest.isEmpty { buffers.append(DriverBuffer(place(Array(rest)), UInt32(rest.count), isDeviceWritable: false)) }
    let table = indirect ? front.allocate(16 * buffers.count) : nil
    let head = transmit.offer(buffers, indirectTable: table)
    let used = try transmit.nextUsed()
    checkEqual(used.head, head ?? 0xFFFF)
    checkEqual(used.written ?? 0, 0)
  }

  /// Offers one receive buffer made of pieces; where they lie, by head.
  struct Buffer {
    let head: UInt16
    let pieces: [(GuestAddress, Int)]
    var byteCount: Int { pieces.reduce(0) { $0 + $1.1 } }
  }
  var offered: [UInt16: Buffer] = [:]

  func offer(_ sizes: [Int]) throws {
    let pieces = sizes.map { (front.allocate($0, alignment: 1), $0) }
    let head = receive.offer(pieces.map { DriverBuffer($0.0, UInt32($0.1), isDeviceWritable: true) })
    offered[try unwrap(head)] = Buffer(head: head ?? 0, pieces: pieces)
  }

  /// The next received packet: header, frame, and how many buffers it took.
  func take(within limit: Duration = .seconds(5)) throws -> (header: NetHeader, frame: [UInt8], buffers: Int) {
    var packet: [UInt8] = []
    var count = 0
    var wanted = 1
    while count < wanted {
      let used = try receive.nextUsed(within: limit)
      let buffer = try unwrap(offered.removeValue(forKey: used.head))
      let written = Int(used.written ?? 0)
      check(written <= buffer.byteCount, "No more is reported than there was room for")
      var content: [UInt8] = []
      for (address, length) in buffer.pieces { content += try unwrap(front.memory.bytes(at: address, count: length)) }
      packet += content[..<written]
      if count == 0 {
        guard packet.count >= 12 else { return (NetHeader(), [], 1) }
        wanted = Int(packet[10]) | Int(packet[11]) << 8
      }
      count += 1
    }
    return (DriverSide.header(packet), Array(packet.dropFirst(12)), count)
  }

  static func bytes(_ header: NetHeader) -> [UInt8] { withUnsafeBytes(of: header) { Array($0) } }
  static func header(_ bytes: [UInt8]) -> NetHeader { bytes.withUnsafeBytes { $0.loadUnaligned(as: NetHeader.self) } }
}
