import CFuzz
import Glibc
import HostSystem
import VMMemory

@testable import Boot

let kernelImages = Target(
  name: "kernel-image", about: "loading bzImages and ELF kernels: what is planned lies in the file and in memory, and is loaded",
  seeds: { [bzImage(), elf(wide: true), elf(wide: false)].map { [0, 9] + $0 } + [[3, 0] + bzImage(), [2, 200] + elf(wide: true)] },
  words: ["HdrS", "\u{7F}ELF", "Xen", "MZ"], run: load)

/// Fields of a file: place, width, value.
private func build(_ count: Int, _ fields: [(Int, Int, UInt64)]) -> [UInt8] {
  var bytes = [UInt8](repeating: 0, count: count)
  for (place, width, value) in fields {
    for index in 0..<width { bytes[place + index] = UInt8(truncatingIfNeeded: value >> UInt64(8 * index)) }
  }
  return bytes
}

private func bzImage() -> [UInt8] {
  build(
    2048,
    [
      (0x1F1, 1, 1), (0x1F4, 4, 64), (0x1FE, 2, 0xAA55), (0x201, 1, 0x6A), (0x202, 4, 0x5372_6448), (0x206, 2, 0x20F), (0x211, 1, 1),
      (0x22C, 4, 0x7FFF_FFFF), (0x230, 4, 0x20_0000), (0x234, 1, 1), (0x236, 2, 3), (0x238, 4, 2047), (0x258, 8, 0x10_0000),
      (0x260, 4, 0x1000),
    ])
}

private func elf(wide: Bool) -> [UInt8] {
  let table = 64
  var fields: [(Int, Int, UInt64)] = [(0, 4, 0x464C_457F), (5, 1, 1)]
  func note(_ place: Int) {
    fields += [(place, 4, 4), (place + 4, 4, 4), (place + 8, 4, 18), (place + 12, 4, 0x6E_6558), (place + 16, 4, 0x10_0010)]
  }
  if wide {
    fields += [(4, 1, 2), (18, 2, 62), (32, 8, 64), (54, 2, 56), (56, 2, 2)]
    fields += [(table, 4, 1), (table + 8, 8, 0x100), (table + 24, 8, 0x10_0000), (table + 32, 8, 0x40), (table + 40, 8, 0x200)]
    fields += [(table + 56, 4, 4), (table + 64, 8, 0x180), (table + 88, 8, 20), (table + 96, 8, 20)]
  } else {
    fields += [(4, 1, 1), (18, 2, 3), (28, 4, 64), (42, 2, 32), (44, 2, 2)]
    fields += [(table, 4, 1), (table + 4, 4, 0x100), (table + 12, 4, 0x10_0000), (table + 16, 4, 0x40), (table + 20, 4, 0x200)]
    fields += [(table + 32, 4, 4), (table + 36, 4, 0x180), (table + 48, 4, 20), (table + 52, 4, 20)]
  }
  note(0x180)
  return build(0x200, fields)
}

private let memoryByteCount: UInt64 = 8 << 20
private let mapping = sure { try MemoryMapping.anonymous(byteCount: Int(memoryByteCount) + 8192) }
private let memory = sure { () throws -> GuestMemory in
  cfuzz_poison(mapping.baseAddress, 4096)
  cfuzz_poison(mapping.baseAddress + 4096 + Int(memoryByteCount), 4096)
  return try GuestMemory(regions: [
    MemoryRegion(
      guestAddress: GuestAddress(0), byteCount: memoryByteCount, frontEndAddress: 0, fileOffset: 0, mapping: mapping, mappingOffset: 4096)
  ])
}

private func load(_ script: inout Script) {
  let how = script.byte()
  let ramdiskByteCount = Int(script.byte()) << (how & 4 == 0 ? 4 : 12)
  let file = script.rest()
  let size: UInt64 = how & 3 == 3 ? 4 << 30 : how & 3 == 2 ? 4 << 20 : memoryByteCount
  let ramdisk = how & 8 == 0 ? nil : PayloadBytes([UInt8](repeating: 0xDD, count: ramdiskByteCount))
  let configuration = sure {
    BootConfiguration(
      map: try PhysicalMap(memoryByteCount: size, addressBits: 40), processorIDs: how & 16 == 0 ? [0] : [0, 1, 2, 3],
      commandLine: Array("console=ttyS0".utf8))
  }
  let plan: BootPlan
  do throws(BootError) {
    plan = try BootPlan(configuration: configuration, kernel: PayloadBytes(file), initramfs: ramdisk)
  } catch { return demand(!"\(error)".isEmpty, "an error without words") }

  // Nothing lies outside of file or memory, and nothing on anything else.
  let low = configuration.map.lowMemory
  var taken: [Range<UInt64>] = []
  func claim(_ start: UInt64, _ count: UInt64, _ what: String) {
    let (end, overflow) = start.addingReportingOverflow(count)
    demand(!overflow && end <= low.upperBound, "\(what) lies outside memory")
    demand(!taken.contains { $0.overlaps(start..<end) }, "\(what) lies on something else")
    taken.append(start..<end)
  }
  for write in plan.writes {
    claim(write.address, UInt64(write.bytes.count), "what we write at \(write.address)")
    demand(write.address + UInt64(write.bytes.count) <= LowMemory.kernelBase, "our own bytes lie where kernels are")
  }
  for copy in plan.copies {
    let source = copy.file == .kernel ? UInt64(file.count) : UInt64(ramdiskByteCount)
    let (end, overflow) = copy.fileOffset.addingReportingOverflow(copy.byteCount)
    demand(!overflow && end <= source && copy.byteCount > 0, "a copy from beyond the file")
    demand(copy.address >= LowMemory.kernelBase, "a copy to where our own bytes are")
    claim(copy.address, copy.byteCount, "a copy to \(copy.address)")
  }
  demand(low.contains(plan.entry.instructionPointer), "the entry lies outside memory")
  if let range = plan.initramfs { demand(range.lowerBound % 4096 == 0 && range.upperBound <= low.upperBound, "the initramfs lies badly") }

  guard size == memoryByteCount, file.count > 0, ramdisk == nil else { return }
  madvise(mapping.baseAddress + 4096, Int(memoryByteCount), MADV_DONTNEED)
  let image = sure { try SharedMemory.sealed(name: "kernel", byteCount: UInt64(file.count)) }
  sure { try image.writeAll(file) }
  guard let kernel = try? PayloadFile(adopting: image) else { return demand(false, "a file is refused") }
  do throws(BootError) {
    try plan.load(into: memory, kernel: kernel, initramfs: nil)
  } catch { return demand(false, "a plan cannot be carried out: \(error)") }
  for copy in plan.copies {
    let place = Int(copy.fileOffset)
    demand(
      memory.bytes(at: GuestAddress(copy.address), count: Int(copy.byteCount)) == Array(file[place..<place + Int(copy.byteCount)]),
      "what was loaded is not what is in the file")
  }
}
