import CLinux
import Glibc
import HostSystem
import Synchronization

/// The network behind an interface, such as a tap: sends our frames back, or sends frames of its own. Frames that are only
/// to be taken are the kernel's to drop.
final class FarEnd: Sendable {
  private let socket: CInt
  private let isStopping = Atomic<Bool>(false)
  private let thread: Mutex<HostThread?> = Mutex(nil)

  /// Only frames of this type are seen, and sent (the one kept for local experiments).
  private static let etherType: UInt16 = 0x88B5

  init(_ interface: String, _ mode: NetJob.Mode, _ frameSize: Int) throws(ProbeError) {
    let number = unsafe interface.withCString { unsafe clinux_packet_socket($0, Self.etherType) }
    guard number >= 0 else {
      throw .system(SystemError("play the network at interface \(interface) (it needs to be there, and root)", Errno(-number)))
    }
    socket = number
    guard mode.receives else { return }
    let started = try wrapping { () throws(SystemError) in
      try HostThread.start(name: "far end") { [self] in mode == .loop ? reflect() : produce(frameSize) }
    }
    thread.withLock { $0 = started }
  }

  func stop() {
    isStopping.store(true, ordering: .releasing)
    thread.withLock {
      $0?.join()
      $0 = nil
    }
  }

  deinit { _ = close(socket) }

  private func reflect() {
    var frame = [UInt8](repeating: 0, count: 65536)
    // SAFETY: the array is ours and has so many bytes.
    unsafe frame.withUnsafeMutableBytes { bytes in
      while !isStopping.load(ordering: .relaxed) {
        let count = unsafe recv(socket, bytes.baseAddress, bytes.count, 0)
        if count > 0 { unsafe send(socket, bytes.baseAddress, count, CInt(MSG_DONTWAIT)) }
      }
    }
  }

  private func produce(_ byteCount: Int) {
    let head: [UInt8] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xB5]
    let frame = head + [UInt8](repeating: 0, count: byteCount - head.count)
    // SAFETY: the array is ours and has so many bytes.
    unsafe frame.withUnsafeBytes { bytes in
      while !isStopping.load(ordering: .relaxed) { unsafe send(socket, bytes.baseAddress, bytes.count, 0) }
    }
  }
}
