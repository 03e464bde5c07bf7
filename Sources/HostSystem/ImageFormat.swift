import Glibc

/// Formats of disk images that are more than the bytes of a disk, told by how their files begin. Who serves such a file as it is
/// shows the guest tables instead of a disk, and what the guest writes ruins them.
///
/// A raw disk can begin like any of these, for its guest writes what it likes: so this only tells when to ask, never what to open.
package enum ImageFormat: String, CaseIterable, Sendable {
  case qcow, qcow2, qed, vmdk, vdi, vhd, vhdx, parallels

  /// How much of a file is looked at.
  private static let headByteCount = 128

  /// What the file begins like; nil for anything else, and for what cannot be read.
  package static func told(by fd: borrowing OwnedFD) -> ImageFormat? {
    var head = [UInt8](repeating: 0, count: headByteCount)
    let number = fd.rawValue
    let count = unsafe head.withUnsafeMutableBytes { buffer in
      // SAFETY: the buffer is ours, writable for its whole count.
      unsafe pread(number, buffer.baseAddress, buffer.count, 0)
    }
    return count > 0 ? told(by: Array(head.prefix(count))) : nil
  }

  /// - Parameter head: a file's first bytes.
  package static func told(by head: [UInt8]) -> ImageFormat? {
    func begins(_ text: String) -> Bool { head.starts(with: text.utf8) }
    // QEMU's docs/interop/qcow2.rst: the version is a big-endian number behind the magic.
    if head.starts(with: [0x51, 0x46, 0x49, 0xFB]), head.count >= 8, head[4...6].allSatisfy({ $0 == 0 }) {
      if head[7] == 1 { return .qcow }
      if head[7] == 2 || head[7] == 3 { return .qcow2 }
    }
    if begins("QED\0") { return .qed }
    // VMware's Virtual Disk Format 5.0: sparse extents of both kinds, and the descriptor.
    if begins("KDMV") || begins("COWD") || begins("# Disk DescriptorFile") { return .vmdk }
    // VirtualBox's VDICore.h: behind 64 bytes of text.
    if head.dropFirst(64).starts(with: [0x7F, 0x10, 0xDA, 0xBE]) { return .vdi }
    // A dynamic disk begins with a copy of its footer; one of fixed size begins with its bytes.
    if begins("conectix") { return .vhd }
    // [MS-VHDX] 2.2.1
    if begins("vhdxfile") { return .vhdx }
    // QEMU's docs/interop/parallels.rst
    if begins("WithoutFreeSpace") || begins("WithouFreSpacExt") { return .parallels }
    return nil
  }
}
