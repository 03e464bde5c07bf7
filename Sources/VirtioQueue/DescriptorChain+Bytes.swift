import CLinux
import Glibc
import HostSystem
import VirtioSpec

/// Taking bytes out of a chain and putting bytes into it, whatever pieces the driver made of them.
extension DescriptorChain {
  /// Copies the next readable bytes out and moves past them; nil, and nothing taken, if there are too few.
  @inlinable
  public mutating func takeReadable<Value: RequestBytes>(_ type: Value.Type = Value.self) -> Value? {
    let count = MemoryLayout<Value>.size
    guard count <= readableCount else { return nil }
    return unsafe withUnsafeTemporaryAllocation(byteCount: count, alignment: MemoryLayout<Value>.alignment) { buffer in
      unsafe takeReadable(into: buffer)
      // SAFETY: `RequestBytes` promises that any bytes are a value; the buffer has its size and alignment.
      return unsafe buffer.baseAddress?.load(as: Value.self)
    }
  }

  /// Copies readable bytes out until `buffer` is full and moves past them. There are at least that many.
  @inlinable
  public mutating func takeReadable(into buffer: UnsafeMutableRawBufferPointer) {
    precondition(buffer.count <= readableCount, "Taking more than the chain has to read")
    var done = 0
    // Bounded by the pieces: each round uses up one or fills the buffer.
    while done < buffer.count {
      // SAFETY: readableCount says that there is a piece left; the piece has iov_len bytes of guest memory.
      let piece = unsafe segments[readableStart]
      let count = unsafe min(piece.iov_len, buffer.count - done)
      if let target = buffer.baseAddress, let source = unsafe piece.iov_base {
        unsafe (target + done).copyMemory(from: source, byteCount: count)
      }
      advanceReadable(by: count)
      done += count
    }
    // The compiler must not look at the guest's bytes again instead of the copy.
    clinux_fence_acquire()
  }

  /// Copies readable bytes out, as many as there are and at most `limit`, and moves past them.
  public mutating func takeReadableBytes(atMost limit: Int) -> [UInt8] {
    let count = min(max(0, limit), readableCount)
    // SAFETY: exactly `count` bytes are initialised, and there are as many to take.
    return unsafe [UInt8](unsafeUninitializedCapacity: count) { buffer, initialized in
      unsafe takeReadable(into: UnsafeMutableRawBufferPointer(rebasing: UnsafeMutableRawBufferPointer(buffer)[..<count]))
      initialized = count
    }
  }

  /// Moves past readable bytes without looking at them; as many as there are, at most `byteCount`.
  @inlinable
  public mutating func dropReadable(_ byteCount: Int) {
    var left = min(byteCount, readableCount)
    while left > 0 {
      let count = unsafe min(segments[readableStart].iov_len, left)
      advanceReadable(by: count)
      left -= count
    }
  }

  /// Copies a value into the next writable bytes and moves past them; false, and nothing written, if there is no room.
  @inlinable
  public mutating func put<Value: RequestBytes>(_ value: Value) -> Bool {
    guard MemoryLayout<Value>.size <= writableCount else { return false }
    unsafe withUnsafeBytes(of: value) { bytes in _ = unsafe put(bytes) }
    return true
  }

  /// Copies bytes into the writable part and moves past them; returns how many found room.
  @inlinable
  public mutating func put(_ bytes: UnsafeRawBufferPointer) -> Int {
    let total = min(bytes.count, writableCount)
    var done = 0
    while done < total {
      // SAFETY: writableCount says that there is a piece left.
      let piece = unsafe segments[writableStart]
      let count = unsafe min(piece.iov_len, total - done)
      if let source = bytes.baseAddress, let target = unsafe piece.iov_base {
        unsafe target.copyMemory(from: source + done, byteCount: count)
      }
      advanceWritable(by: count)
      done += count
    }
    return total
  }

  /// As `put(_:)` for raw bytes.
  @discardableResult
  public mutating func put(_ bytes: [UInt8]) -> Int { unsafe bytes.withUnsafeBytes { all in unsafe put(all) } }

  /// Reads from a descriptor straight into the writable part, at most `limit` bytes, until it is full or the descriptor gives
  /// no more, and moves past what was filled. Nothing else than `.bytes` is returned once something has been read.
  public mutating func fill(from fd: borrowing OwnedFD, atMost limit: Int) -> Transfer {
    var done = 0
    // Bounded: each round fills a whole piece or is the last.
    while done < limit, writableCount > 0 {
      // SAFETY: writableCount says that there is a piece left; the kernel writes into memory of the guest's, and copes with
      // its going away.
      let piece = unsafe segments[writableStart]
      let count = unsafe min(piece.iov_len, limit - done)
      let transfer = unsafe fd.read(into: UnsafeMutableRawBufferPointer(start: piece.iov_base, count: count))
      guard case .bytes(let read) = transfer else { return done > 0 ? .bytes(done) : transfer }
      advanceWritable(by: read)
      done += read
      if read < count { break }
    }
    return .bytes(done)
  }

  /// Moves past writable bytes, as after the kernel has filled them; as many as there are, at most `byteCount`.
  @inlinable
  public mutating func dropWritable(_ byteCount: Int) {
    var left = min(byteCount, writableCount)
    while left > 0 {
      let count = unsafe min(segments[writableStart].iov_len, left)
      advanceWritable(by: count)
      left -= count
    }
  }

  /// Takes the last writable byte off the writable part (a block request's status) and says where it is; nil if there
  /// is none. Lent as long as the queue's memory.
  @unsafe @inlinable
  public mutating func takeLastWritableByte() -> UnsafeMutableRawPointer? {
    guard writableCount > 0 else { return nil }
    // SAFETY: there is a piece left, and no piece is empty.
    let last = writableEnd &- 1
    unsafe segments[last].iov_len &-= 1
    let byte = unsafe segments[last].iov_base.map { unsafe $0 + segments[last].iov_len }
    writableCount &-= 1
    if unsafe segments[last].iov_len == 0 { writableEnd = last }
    return unsafe byte
  }

  @inlinable @inline(__always)
  mutating func advanceReadable(by count: Int) {
    // SAFETY: the caller made sure that the first readable piece has at least `count` bytes.
    unsafe segments[readableStart].iov_base = unsafe segments[readableStart].iov_base.map { unsafe $0 + count }
    unsafe segments[readableStart].iov_len &-= count
    readableCount &-= count
    if unsafe segments[readableStart].iov_len == 0 { readableStart &+= 1 }
  }

  @inlinable @inline(__always)
  mutating func advanceWritable(by count: Int) {
    // SAFETY: as above, for the first writable piece.
    unsafe segments[writableStart].iov_base = unsafe segments[writableStart].iov_base.map { unsafe $0 + count }
    unsafe segments[writableStart].iov_len &-= count
    writableCount &-= count
    if unsafe segments[writableStart].iov_len == 0 { writableStart &+= 1 }
  }
}
