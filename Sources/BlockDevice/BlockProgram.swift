import BackendKit
import DiskImage
import Glibc
import HostSystem
import VirtioQueue

/// `martlet-block`: options and start.
public enum BlockProgram {
  public static let program = BackendProgram(
    type: "block", features: ["read-only", "blk-file"],
    options: [
      .value("blk-file", "PATH", "the disk image: a raw file or a block device"),
      .value("blk-fd", "NUMBER", "the disk image as an inherited descriptor"),
      .flag("read-only", "refuse to write, and lock the image for reading only"),
      .value("serial", "TEXT", "what the guest reads as the disk's id (at most 20 bytes)"),
      .value("num-queues", "COUNT", "request queues, 1 to 64 (default: one per processor, at most 8)"),
      .value("queue-size", "COUNT", "most entries of a queue, a power of two up to 1024 (default: 256)"),
      .value("block-size", "BYTES", "logical block: 512 or 4096 (default: the storage's own)"),
      .flag("direct", "bypass the host's page cache"),
      .value("aio", "HOW", "io_uring, or blocking (default: io_uring where the host has it)"),
    ])

  /// Runs the program with the process's arguments; returns its exit code.
  public static func run(_ arguments: [String]) -> CInt {
    program.run(arguments) { launch throws(BackendError) in try makeDevice(launch) }
  }

  static func makeDevice(_ launch: LaunchArguments) throws(BackendError) -> BlockBackend {
    let options = DiskImage.Options(isReadOnly: launch.has("read-only"), isDirect: launch.has("direct"))
    let image: DiskImage
    do {
      switch (launch.value("blk-file"), try launch.descriptor("blk-fd")) {
      case (let path?, nil): image = try DiskImage.open(path, options)
      case (nil, let number?):
        image = try DiskImage(try .inherited(number), name: launch.title.map { "of " + $0 } ?? "descriptor \(number)", options)
      default: throw BackendError.device("Exactly one of --blk-file=PATH and --blk-fd=NUMBER is needed")
      }
    } catch let error as BackendError {
      throw error
    } catch {
      throw .device("\(error)")
    }
    let queueCount = try launch.number("num-queues", in: 1...64) ?? max(1, min(8, sysconf(CInt(_SC_NPROCESSORS_ONLN))))
    let queueSize = try launch.number("queue-size", in: 2...1024) ?? 256
    guard queueSize & (queueSize - 1) == 0 else { throw .badOption("--queue-size", why: "needs a power of two, not \(queueSize)") }
    let blockSize = try launch.number("block-size", in: 512...4096)
    if let blockSize {
      guard blockSize == 512 || blockSize == 4096 else { throw .badOption("--block-size", why: "is 512 or 4096, not \(blockSize)") }
      guard blockSize >= image.logicalBlockSize else {
        throw .badOption("--block-size", why: "is smaller than the storage's own block of \(image.logicalBlockSize) bytes")
      }
    }
    let serial = launch.value("serial") ?? ""
    guard serial.utf8.count <= 20 else { throw .badOption("--serial", why: "has at most 20 bytes, not \(serial.utf8.count)") }
    var access: BlockBackend.Access?
    if let text = launch.value("aio") {
      guard let known = BlockBackend.Access(rawValue: text) else {
        throw .badOption("--aio", why: "is io_uring or blocking, not \(text)")
      }
      access = known
    }
    return BlockBackend(
      image: image, queueCount: queueCount, greatestQueueSize: UInt16(queueSize), blockSize: blockSize, serial: serial, access: access)
  }
}
