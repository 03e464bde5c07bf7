/// A file that a guest is started from: a size and positioned reads. The real one is a descriptor; tests use arrays.
package protocol PayloadReader {
  /// Bytes in the file.
  var byteCount: UInt64 { get }
  /// Reads up to `count` bytes from `offset`; fewer only at the end of the file. The errno of a failed read is thrown.
  func read(at offset: UInt64, count: Int) throws(PayloadReadFailure) -> [UInt8]
}

/// The errno of a failed read.
package struct PayloadReadFailure: Error, Equatable {
  package let errno: CInt

  package init(errno: CInt) {
    self.errno = errno
  }
}

/// A file held in memory.
package struct PayloadBytes: PayloadReader {
  package let bytes: [UInt8]

  package init(_ bytes: [UInt8]) {
    self.bytes = bytes
  }

  package var byteCount: UInt64 { UInt64(bytes.count) }

  package func read(at offset: UInt64, count: Int) throws(PayloadReadFailure) -> [UInt8] {
    guard offset < byteCount, count > 0 else { return [] }
    let start = Int(offset)
    return Array(bytes[start..<start + min(count, bytes.count - start)])
  }
}

extension PayloadReader {
  /// Exactly `count` bytes, or an error that says what is missing.
  func exactly(_ count: Int, at offset: UInt64, of file: BootFile, _ what: String) throws(BootError) -> [UInt8] {
    let bytes: [UInt8]
    do {
      bytes = try read(at: offset, count: count)
    } catch {
      throw .read(file: file, errno: error.errno)
    }
    guard bytes.count == count else {
      throw .truncated(file: file, what: what, offset: offset, byteCount: UInt64(count))
    }
    return bytes
  }

  /// Throws unless `[offset, offset + count)` lies inside the file.
  func require(_ count: UInt64, at offset: UInt64, of file: BootFile, _ what: String) throws(BootError) {
    let (end, overflow) = offset.addingReportingOverflow(count)
    guard !overflow, end <= byteCount else {
      throw .truncated(file: file, what: what, offset: offset, byteCount: count)
    }
  }
}
