import BackendKit
import DiskImage
import Glibc
import HostSystem
import VirtioQueue
import VirtioSpec

/// `martlet-block`: options and start.
public enum BlockProgram {
  public static let program = BackendProgram(
    type: "block", features: ["read-only", "blk-file"],
    options: [
      .value("blk-file", "PATH", "the disk image: a raw file or a block device"),
      .value("blk-fd", "NUMBER", "the disk image as an inherited descriptor"),
      .flag("blk-locked", "with --blk-fd: whoever opened the image has locked it"),
      .value("blk-format", "FORMAT", "raw: the image is meant as it is, even if it begins like one in another format"),
      .value("blk-null", "BYTES", "no storage: every request is done at once and reads bring nothing; for measuring"),
      .flag("read-only", "refuse to write, and lock the image for reading only"),
      .flag("force-share", "with --read-only: no lock at all, though others may write the image meanwhile"),
      .value("serial", "TEXT", "what the guest reads as the disk's id (at most 20 bytes)"),
      .value("lifetime", "EOL,A,B", "how worn the storage says it is (default: what the kernel knows of an eMMC or UFS disk)"),
      .value("num-queues", "COUNT", "request queues, 1 to 64 (default: one per processor)"),
      .value("queue-size", "COUNT", "most entries of a queue, a power of two up to 1024 (default: 256)"),
      .value("ring-without", "LIST", "what not to offer of packed, event_idx and indirect_desc, commas between"),
      .value("block-size", "BYTES", "logical block: 512 or 4096 (default: the storage's own)"),
      .flag("direct", "bypass the host's page cache"),
      .value("aio", "HOW", "io_uring, or threads (default: io_uring where the host has it and the image is not on FUSE)"),
      .value("cache-map", "ON", "on or off: copy data the host has cached from a mapping of the file (default: on where it is safe)"),
      .flag("registered-file", "register the image with io_uring: cheaper requests, but a killed process leaves it locked for some 50 ms"),
      .flag("portable", "offer only what QEMU's storage daemon could go on with: split rings, 126 segments, one range of 16 MiB"),
      .value("poll", "HOW", "look for work before sleeping: auto, off, or so many microseconds (default: auto)"),
      .value("bw-size", "BYTES", "rate limit: bytes in a bucket that refills within --bw-refill-time"),
      .value("bw-one-time-burst", "BYTES", "bytes more at the start, once"),
      .value("bw-refill-time", "MS", "milliseconds to refill the bucket"),
      .value("ops-size", "COUNT", "rate limit: requests in a bucket that refills within --ops-refill-time"),
      .value("ops-one-time-burst", "COUNT", "requests more at the start, once"),
      .value("ops-refill-time", "MS", "milliseconds to refill the bucket"),
    ])

  /// Runs the program with the process's arguments; returns its exit code.
  public static func run(_ arguments: [String]) -> CInt {
    program.run(arguments) { launch throws(BackendError) in try makeDevice(launch) }
  }

  static func makeDevice(_ launch: LaunchArguments) throws(BackendError) -> BlockBackend {
    let blockSize = try launch.number("block-size", in: 512...4096)
    if let blockSize, blockSize != 512, blockSize != 4096 { throw .badOption("--block-size", why: "is 512 or 4096, not \(blockSize)") }
    let image = try openImage(launch, unit: blockSize ?? 512)
    var options = BlockOptions()
    options.queueCount = try launch.number("num-queues", in: 1...64) ?? max(1, min(64, sysconf(CInt(_SC_NPROCESSORS_ONLN))))
    let queueSize = try launch.number("queue-size", in: 2...1024) ?? 256
    guard queueSize & (queueSize - 1) == 0 else { throw .badOption("--queue-size", why: "needs a power of two, not \(queueSize)") }
    options.greatestQueueSize = UInt16(queueSize)
    options.blockSize = blockSize
    if let blockSize, blockSize < image.logicalBlockSize {
      throw .badOption("--block-size", why: "is smaller than the storage's own block of \(image.logicalBlockSize) bytes")
    }
    options.serial = launch.value("serial") ?? ""
    options.isPortable = launch.has("portable")
    guard options.serial.utf8.count <= 20 else {
      throw .badOption("--serial", why: "has at most 20 bytes, not \(options.serial.utf8.count)")
    }
    if let text = launch.value("aio") {
      guard let known = BlockOptions.Access(rawValue: text) else {
        throw .badOption("--aio", why: "is io_uring or threads, not \(text)")
      }
      guard known != .ring || !image.isServedByProcess else {
        throw .badOption(
          "--aio", why: "cannot be io_uring for an image on a file system that is a process (FUSE): say threads, or leave it out")
      }
      options.access = known
    }
    if let text = launch.value("poll") {
      guard let policy = PollPolicy(text) else {
        throw .badOption("--poll", why: "is auto, off, or microseconds from 1 to 1000000, not \(text)")
      }
      options.poll = policy
    }
    if let text = launch.value("lifetime") {
      guard let life = StorageLifetime(text) else { throw .badOption("--lifetime", why: "is three numbers up to 65535, not \(text)") }
      options.lifetime = life
    } else if let status = try? image.file.status() {
      options.lifetime = StorageLifetime.read(of: status)
    }
    for word in (launch.value("ring-without") ?? "").split(separator: ",") {
      switch word {
      case "packed": options.missing.insert(.packedRing)
      case "event_idx": options.missing.insert(.eventIndex)
      case "indirect_desc": options.missing.insert(.indirectDescriptors)
      default: throw .badOption("--ring-without", why: "knows packed, event_idx and indirect_desc, not \(word)")
      }
    }
    options.byteRate = try rate(launch, "bw")
    options.operationRate = try rate(launch, "ops")
    return BlockBackend(image: image, options)
  }

  private static func openImage(_ launch: LaunchArguments, unit: Int) throws(BackendError) -> DiskImage {
    var options = DiskImage.Options(
      isReadOnly: launch.has("read-only"), isDirect: launch.has("direct"), isShared: launch.has("force-share"),
      isLockedLater: launch.isStandby)
    options.unit = unit
    options.isLocked = launch.has("blk-locked")
    options.isRegistered = launch.has("registered-file")
    switch launch.value("blk-format") {
    case nil: break
    case "raw": options.isRaw = true
    case let text?: throw .badOption("--blk-format", why: "is raw, not \(text); other formats are not served")
    }
    guard !options.isLocked || launch.value("blk-fd") != nil else { throw .badOption("--blk-locked", why: "goes with --blk-fd") }
    // The lock is then taken when the front end speaks, which is behind the walls.
    guard !launch.isStandby || launch.walls == .off || options.isLocked || options.isShared || launch.value("blk-null") != nil else {
      throw .badOption("--standby", why: "goes with --blk-locked where the sandbox is on")
    }
    guard !options.isShared || options.isReadOnly else { throw .badOption("--force-share", why: "goes with --read-only") }
    switch launch.value("cache-map") {
    case nil, "on": options.mapsCache = true
    case "off": options.mapsCache = false
    case let text?: throw .badOption("--cache-map", why: "is on or off, not \(text)")
    }
    let nullSize = try launch.number("blk-null", in: 512...Int.max)
    do {
      switch (launch.value("blk-file"), try launch.descriptor("blk-fd"), nullSize) {
      case (let path?, nil, nil): return try DiskImage.open(path, options)
      case (nil, let number?, nil):
        return try DiskImage(try .inherited(number), name: launch.title.map { "of " + $0 } ?? "descriptor \(number)", options)
      case (nil, nil, let size?): return try DiskImage(nullOf: UInt64(size))
      default: throw BackendError.device("Exactly one of --blk-file=PATH, --blk-fd=NUMBER and --blk-null=SIZE is needed")
      }
    } catch { throw BackendError(error) }
  }

  private static func rate(_ launch: LaunchArguments, _ name: String) throws(BackendError) -> RateBucket? {
    let size = try launch.number(name + "-size", in: 1...(1 << 50))
    let time = try launch.number(name + "-refill-time", in: 1...86_400_000)
    let burst = try launch.number(name + "-one-time-burst", in: 0...(1 << 50))
    guard let size, let time else {
      guard size == nil, time == nil, burst == nil else {
        throw .badOption("--\(name)-size", why: "and --\(name)-refill-time go together")
      }
      return nil
    }
    return RateBucket(size: UInt64(size), oneTimeBurst: UInt64(burst ?? 0), refillTime: .milliseconds(time))
  }
}
