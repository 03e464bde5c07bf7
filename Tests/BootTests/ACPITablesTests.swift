import Boot
import Foundation
import Testing

@Suite("ACPI tables")
struct ACPITablesTests {
  func tables(processors: Int, memory: UInt64 = 8 << 30) throws -> ACPITables {
    try ACPITables(
      map: PhysicalMap(memoryByteCount: memory, addressBits: 46), processorIDs: (0..<processors).map(UInt32.init))
  }

  @Test("Every table's bytes add up to zero and its length is its own", arguments: [1, 2, 64, 300, 1024])
  func checksums(processors: Int) throws {
    let acpi = try tables(processors: processors)
    #expect(acpi.bytes[0..<20].reduce(0, &+) == 0)
    #expect(acpi.bytes[0..<36].reduce(0, &+) == 0)
    #expect(Array(acpi.bytes[0..<8]) == Array("RSD PTR ".utf8))
    #expect(acpi.tables.map(\.signature) == ["DSDT", "FACP", "APIC", "MCFG", "XSDT"])
    for table in acpi.tables {
      let bytes = Array(acpi.bytes[table.range])
      #expect(bytes.reduce(0, &+) == 0, "\(table.signature)")
      #expect(Array(bytes[0..<4]) == Array(table.signature.utf8))
      #expect(KernelFiles.load(bytes, at: 4, 4) == UInt64(bytes.count))
      #expect(table.range.lowerBound % 16 == 0)
    }
  }

  @Test("Root pointer leads to the XSDT, the XSDT to the others, the FADT to the DSDT")
  func pointers() throws {
    let acpi = try tables(processors: 2)
    func address(_ signature: String) throws -> UInt64 {
      acpi.rootPointer + UInt64(try #require(acpi.tables.first { $0.signature == signature }).range.lowerBound)
    }
    #expect(KernelFiles.load(acpi.bytes, at: 24, 8) == (try address("XSDT")))
    let xsdt = Array(acpi.bytes[try #require(acpi.tables.first { $0.signature == "XSDT" }).range])
    let listed = stride(from: 36, to: xsdt.count, by: 8).map { KernelFiles.load(xsdt, at: $0, 8) }
    #expect(listed == [try address("FACP"), try address("APIC"), try address("MCFG")])
    let fadt = Array(acpi.bytes[try #require(acpi.tables.first { $0.signature == "FACP" }).range])
    #expect(fadt.count == 276)
    #expect(KernelFiles.load(fadt, at: 140, 8) == (try address("DSDT")))
    #expect(KernelFiles.load(fadt, at: 112, 4) & (1 << 20 | 1 << 10) == 1 << 20 | 1 << 10)
  }

  @Test("The MADT lists ids below 255 as local APICs and the rest as x2APICs", arguments: [1, 255, 256, 1024])
  func processorEntries(processors: Int) throws {
    let acpi = try tables(processors: processors)
    let madt = Array(acpi.bytes[try #require(acpi.tables.first { $0.signature == "APIC" }).range])
    var kinds: [UInt8: Int] = [:]
    var at = 44
    while at < madt.count {
      kinds[madt[at], default: 0] += 1
      #expect(madt[at + 1] >= 6)
      at += Int(madt[at + 1])
    }
    #expect(at == madt.count)
    #expect(kinds[0, default: 0] == min(processors, 255))
    #expect(kinds[9, default: 0] == max(0, processors - 255))
    #expect(kinds[1] == 1 && kinds[2] == 1 && kinds[4] == 1)
  }

  @Test("Absurd processor lists are refused")
  func processorLists() throws {
    let map = try PhysicalMap(memoryByteCount: 64 << 20, addressBits: 40)
    for ids in [[], [1, 1], [2, 1], (0..<4097).map(UInt32.init)] as [[UInt32]] {
      #expect(throws: BootError.self) { try ACPITables(map: map, processorIDs: ids) }
    }
  }

  /// `acpiexec` is ACPICA's own interpreter, the one that Linux has; its ports read as what they are filled with.
  @Test("The event method tells every slot that a device came or must go, and ejecting writes that slot's bit")
  func hotPlugMethods() throws {
    let interpreter = "/usr/bin/acpiexec"
    guard FileManager.default.isExecutableFile(atPath: interpreter) else {
      print("skipped: acpiexec is not installed (package acpica-tools)")
      return
    }
    let folder = FileManager.default.temporaryDirectory.appendingPathComponent("martlet-acpi-\(UUID().uuidString)")
    try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    defer { try? FileManager.default.removeItem(at: folder) }
    let acpi = try tables(processors: 1)
    let range = try #require(acpi.tables.first { $0.signature == "DSDT" }).range
    try Data(acpi.bytes[range]).write(to: folder.appendingPathComponent("dsdt.dat"))
    func run(_ fill: String, _ command: String) throws -> String {
      let process = Process()
      process.executableURL = URL(fileURLWithPath: interpreter)
      process.arguments = ["-fv", fill, "-b", command, "dsdt.dat"]
      process.currentDirectoryURL = folder
      let pipe = Pipe()
      process.standardOutput = pipe
      process.standardError = pipe
      try process.run()
      let output = String(decoding: pipe.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self)
      process.waitUntilExit()
      return output
    }
    func notified(_ output: String, _ slot: String, _ value: String) -> Bool {
      output.split(separator: "\n").contains { $0.contains("[\(slot)]") && $0.contains("Notif") && $0.contains(value) }
    }
    let all = try run("0xFF", "execute \\_SB.GED._EVT 16")
    #expect(notified(all, "SL01", "0x01") && notified(all, "SL01", "0x03"), "\(all)")
    #expect(notified(all, "SL1F", "0x01") && notified(all, "SL1F", "0x03") && notified(all, "SL10", "0x03"), "\(all)")
    #expect(!all.contains("[SL00]"))
    let none = try run("0x00", "execute \\_SB.GED._EVT 16")
    #expect(!none.contains("[SL"), "\(none)")
    for (slot, address) in [("SL01", "10000"), ("SL1F", "1F0000")] {
      #expect(try run("0", "execute \\_SB.PC00.\(slot)._ADR").uppercased().contains(address))
      #expect(try !run("0", "execute \\_SB.PC00.\(slot)._EJ0 1").contains("AE_"))
    }
  }

  @Test("The ACPI compiler disassembles every table and compiles the result without a complaint", arguments: [1, 300])
  func disassembly(processors: Int) throws {
    let compiler = "/usr/bin/iasl"
    guard FileManager.default.isExecutableFile(atPath: compiler) else {
      print("skipped: iasl is not installed (package acpica-tools)")
      return
    }
    let folder = FileManager.default.temporaryDirectory.appendingPathComponent("martlet-acpi-\(UUID().uuidString)")
    try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    defer { try? FileManager.default.removeItem(at: folder) }
    func run(_ arguments: [String]) throws -> (status: Int32, output: String) {
      let process = Process()
      process.executableURL = URL(fileURLWithPath: compiler)
      process.arguments = arguments
      process.currentDirectoryURL = folder
      let pipe = Pipe()
      process.standardOutput = pipe
      process.standardError = pipe
      try process.run()
      let output = String(decoding: pipe.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self)
      process.waitUntilExit()
      return (process.terminationStatus, output)
    }
    let acpi = try tables(processors: processors)
    for table in acpi.tables {
      let name = table.signature.lowercased()
      try Data(acpi.bytes[table.range]).write(to: folder.appendingPathComponent("\(name).dat"))
      let disassembled = try run(["-d", "\(name).dat"])
      #expect(disassembled.status == 0, "\(disassembled.output)")
      #expect(!disassembled.output.contains("Invalid") && !disassembled.output.contains("Error"), "\(disassembled.output)")
      let compiled = try run(["-we", "-oa", "\(name).dsl"])
      #expect(compiled.status == 0, "\(compiled.output)")
      if name == "dsdt" {
        #expect(compiled.output.contains("0 Errors, 0 Warnings"), "\(compiled.output)")
        // Compiling the disassembly gives the very bytes back, apart from the header (compiler id and checksum).
        let again = [UInt8](try Data(contentsOf: folder.appendingPathComponent("dsdt.aml")))
        let same = again.dropFirst(36).elementsEqual(acpi.bytes[table.range].dropFirst(36))
        #expect(same)
      }
    }
  }
}
