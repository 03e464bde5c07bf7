import CFuzz
import Glibc
import HostSystem

/// An input read as a list of decisions. After its end every decision is zero.
struct Script {
  let bytes: [UInt8]
  private(set) var position = 0

  init(_ bytes: UnsafeBufferPointer<UInt8>) { self.bytes = Array(bytes) }

  var isOver: Bool { position >= bytes.count }

  mutating func byte() -> UInt8 {
    guard position < bytes.count else { return 0 }
    position += 1
    return bytes[position - 1]
  }

  mutating func bool() -> Bool { byte() & 1 == 1 }
  mutating func u16() -> UInt16 { UInt16(byte()) | UInt16(byte()) << 8 }
  mutating func u32() -> UInt32 { UInt32(u16()) | UInt32(u16()) << 16 }
  mutating func u64() -> UInt64 { UInt64(u32()) | UInt64(u32()) << 32 }

  /// 0 to `limit` - 1.
  mutating func below(_ limit: Int) -> Int { Int(limit <= 256 ? UInt16(byte()) : u16()) % max(1, limit) }

  /// A number of the kind that breaks arithmetic more often than chance would bring it.
  mutating func number() -> UInt64 {
    switch byte() & 7 {
    case 0: UInt64(byte())
    case 1: UInt64(u16())
    case 2: UInt64(u32())
    case 3: u64()
    case 4: UInt64(1) << UInt64(byte() & 63)
    case 5: (UInt64(1) << UInt64(byte() & 63)) &- UInt64(byte() & 15)
    case 6: UInt64.max &- UInt64(byte())
    default: UInt64(byte()) << 12
    }
  }

  /// Up to `limit` bytes; fewer at the end.
  mutating func take(_ limit: Int) -> [UInt8] {
    let end = min(bytes.count, position + max(0, limit))
    defer { position = end }
    return Array(bytes[position..<end])
  }

  mutating func rest() -> [UInt8] { take(bytes.count) }
}

/// The other way: decisions written down, for seeds.
struct ScriptWriter {
  var bytes: [UInt8] = []
  mutating func byte(_ value: Int) { bytes.append(UInt8(truncatingIfNeeded: value)) }
  mutating func u16(_ value: Int) {
    byte(value)
    byte(value >> 8)
  }
}

/// Ends the process with a finding unless `condition` holds.
func demand(_ condition: Bool, _ message: @autoclosure () -> String) {
  if condition { return }
  cfuzz_say("DEMAND: \(message())\n")
  abort()
}

/// The value, which cannot be missing in a sound process.
func needed<T: ~Copyable>(_ value: consuming T?, _ what: String) -> T {
  guard let value else {
    cfuzz_say("HARNESS: \(what) cannot be had\n")
    exit(2)
  }
  return value
}

/// Runs what cannot fail in a sound process.
func sure<T: ~Copyable>(_ what: String = "a descriptor or memory", _ body: () throws -> T) -> T {
  do { return try body() } catch {
    cfuzz_say("HARNESS: \(what): \(error)\n")
    exit(2)
  }
}

/// A small generator with a seed, for seeds and the rewriting thread.
struct Dice {
  var state: UInt64
  mutating func next() -> UInt64 {
    state ^= state << 13
    state ^= state >> 7
    state ^= state << 17
    return state
  }
  mutating func bytes(_ count: Int) -> [UInt8] { (0..<count).map { _ in UInt8(truncatingIfNeeded: next() >> 24) } }
}

/// Takes what has come on a socket, once; descriptors that came with it are closed unless `keep` wants them.
func receive(_ socket: borrowing OwnedFD, into bytes: inout [UInt8], keep: (consuming OwnedFD) -> Void = { _ in }) -> Int? {
  bytes.withUnsafeMutableBytes { buffer in
    var reception = UnixSocket.receive(socket, into: buffer, descriptorLimit: 32, waiting: false)
    while let fd = reception.descriptors.takeFirst() { keep(fd) }
    if case .bytes(let count) = reception.transfer { return count }
    return nil
  }
}
