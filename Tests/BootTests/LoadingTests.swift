import Boot
import Foundation
import Glibc
import HostSystem
import Testing
import VMMemory

@Suite("Boot plans are loaded from descriptors into guest memory")
struct LoadingTests {
  func memory(_ byteCount: Int) throws -> GuestMemory {
    let mapping = try MemoryMapping.anonymous(byteCount: byteCount)
    return try GuestMemory(regions: [
      MemoryRegion(
        guestAddress: GuestAddress(0), byteCount: UInt64(byteCount), frontEndAddress: 0, fileOffset: 0, mapping: mapping)
    ])
  }

  struct File: ~Copyable {
    let path: String
    let fd: OwnedFD
  }

  func file(_ bytes: [UInt8]) throws -> File {
    let path = FileManager.default.temporaryDirectory.appendingPathComponent("martlet-\(UUID().uuidString)").path
    try Data(bytes).write(to: URL(fileURLWithPath: path))
    return File(path: path, fd: try OwnedFD.open(path, O_RDONLY))
  }

  @Test("Kernel code, initramfs and tables arrive byte for byte")
  func loading() throws {
    let kernelBytes = KernelFiles.bzImage()
    let ramdiskBytes = (0..<10_000).map { UInt8(truncatingIfNeeded: $0 &* 7) }
    let kernelFile = try file(kernelBytes)
    let ramdiskFile = try file(ramdiskBytes)
    defer {
      unlink(kernelFile.path)
      unlink(ramdiskFile.path)
    }
    let kernel = try PayloadFile(adopting: kernelFile.fd.duplicate())
    let ramdisk = try PayloadFile(adopting: ramdiskFile.fd.duplicate())
    let plan = try BootPlan(
      configuration: BootConfiguration(
        map: PhysicalMap(memoryByteCount: 32 << 20, addressBits: 40), processorIDs: [0], commandLine: [0x61]),
      kernel: kernel, initramfs: ramdisk)
    let memory = try memory(32 << 20)
    try plan.load(into: memory, kernel: kernel, initramfs: ramdisk)
    #expect(memory.bytes(at: GuestAddress(0x100_0000), count: 4096) == Array(kernelBytes[1024...]))
    let range = try #require(plan.initramfs)
    #expect(memory.bytes(at: GuestAddress(range.lowerBound), count: 10_000) == ramdiskBytes)
    #expect(memory.bytes(at: GuestAddress(0xE0000), count: 8) == Array("RSD PTR ".utf8))
    #expect(memory.bytes(at: GuestAddress(0x20000), count: 2) == [0x61, 0])
  }

  @Test("A file that shrinks after its header was read is an error of that file")
  func shrinkingFile() throws {
    let kernelFile = try file(KernelFiles.bzImage())
    defer { unlink(kernelFile.path) }
    let kernel = try PayloadFile(adopting: kernelFile.fd.duplicate())
    let plan = try BootPlan(
      configuration: BootConfiguration(
        map: PhysicalMap(memoryByteCount: 32 << 20, addressBits: 40), processorIDs: [0], commandLine: []),
      kernel: kernel, initramfs: PayloadFile?.none)
    truncate(kernelFile.path, 2000)
    #expect(throws: BootError.truncated(file: .kernel, what: "The part to load", offset: 1024, byteCount: 4096)) {
      try plan.load(into: memory(32 << 20), kernel: kernel, initramfs: nil)
    }
  }

  @Test("Directories and devices are no kernels")
  func wrongKinds() throws {
    for path in ["/", "/dev/null"] {
      #expect(throws: PayloadReadFailure.self) { _ = try PayloadFile(adopting: OwnedFD.open(path, O_RDONLY)) }
    }
  }
}
