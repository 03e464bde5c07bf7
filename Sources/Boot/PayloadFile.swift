import Glibc
import HostSystem
import VMMemory

/// A kernel or initramfs as an open descriptor. Its size is looked at once; a file that shrinks later is an error of
/// reading, never a fault.
package final class PayloadFile: PayloadReader, Sendable {
  private let fd: OwnedFD
  package let byteCount: UInt64

  /// Adopts a descriptor of a regular file, opened for reading.
  package init(adopting fd: consuming OwnedFD) throws(PayloadReadFailure) {
    let status: FileStatus
    do { status = try fd.status() } catch { throw PayloadReadFailure(errno: error.errno.rawValue) }
    guard status.kind == .regular else { throw PayloadReadFailure(errno: EINVAL) }
    byteCount = status.byteCount
    self.fd = fd
  }

  package func read(at offset: UInt64, count: Int) throws(PayloadReadFailure) -> [UInt8] {
    // Never more than the file has, whatever a header claims.
    guard offset < byteCount, count > 0 else { return [] }
    let wanted = Int(min(UInt64(count), byteCount - offset))
    var bytes = [UInt8](repeating: 0, count: wanted)
    let done = try unsafe bytes.withUnsafeMutableBytes { buffer in unsafe fill(buffer, from: offset) }.get()
    return done == wanted ? bytes : Array(bytes[..<done])
  }

  /// Fills `buffer` from `offset` until it is full or the file ends; returns the bytes read.
  private func fill(
    _ buffer: UnsafeMutableRawBufferPointer, from offset: UInt64
  ) -> Result<Int, PayloadReadFailure> {
    var done = 0
    while done < buffer.count {
      guard let position = Int(exactly: offset + UInt64(done)) else {
        return .failure(PayloadReadFailure(errno: EOVERFLOW))
      }
      // SAFETY: done < count, so the rest of the buffer starts inside it.
      let rest = unsafe UnsafeMutableRawBufferPointer(rebasing: buffer[done...])
      let result = unsafe pread(fd.rawValue, rest.baseAddress, rest.count, position)
      if result == 0 { break }
      if result < 0 {
        let error = Errno.current
        if error == .interrupted { continue }
        return .failure(PayloadReadFailure(errno: error.rawValue))
      }
      done += result
    }
    return .success(done)
  }

  /// Copies a part of the file into guest memory by reading straight into its mapping.
  func load(_ copy: BootPlan.Copy, into memory: GuestMemory) throws(BootError) {
    // SAFETY: the pointer covers the whole range and is used only while `memory` lives, in this function.
    guard copy.byteCount <= UInt64(Int.max),
      let base = unsafe memory.translate(GuestAddress(copy.address), byteCount: copy.byteCount)
    else {
      throw .guestMemory(address: copy.address, byteCount: copy.byteCount)
    }
    let done: Int
    do {
      done = try unsafe fill(
        UnsafeMutableRawBufferPointer(start: base, count: Int(copy.byteCount)), from: copy.fileOffset
      ).get()
    } catch {
      throw .read(file: copy.file, errno: error.errno)
    }
    guard UInt64(done) == copy.byteCount else {
      throw .truncated(
        file: copy.file, what: "The part to load", offset: copy.fileOffset, byteCount: copy.byteCount)
    }
  }
}

extension BootPlan {
  /// Puts everything into guest memory. The memory must be all zeros: parts of the kernel that have no bytes in the file
  /// are not written. The vCPUs must not run.
  package func load(
    into memory: GuestMemory, kernel: PayloadFile, initramfs: PayloadFile?
  ) throws(BootError) {
    for write in writes {
      guard memory.copyIn(write.bytes, at: GuestAddress(write.address)) else {
        throw .guestMemory(address: write.address, byteCount: UInt64(write.bytes.count))
      }
    }
    for copy in copies {
      switch copy.file {
      case .kernel: try kernel.load(copy, into: memory)
      case .initramfs: try initramfs?.load(copy, into: memory)
      }
    }
  }
}
