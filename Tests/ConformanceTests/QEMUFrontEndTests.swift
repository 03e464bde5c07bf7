import Foundation
import TestSupport
import Testing

/// QEMU as the front end of our block back end: its firmware finds the disk, boots from it, reads, writes and resets.
@Suite struct QEMUFrontEndTests {
  /// A boot sector: reads sector 1, adds one to its first byte, writes it back; below three it resets the machine, then
  /// it leaves QEMU with code 0x10 (0x01 if the firmware reported an error).
  private static let bootSector: [UInt8] =
    [
      0x31, 0xc0, 0x8e, 0xd8,  // xor ax, ax; mov ds, ax
      0xb4, 0x42, 0xbe, 0x38, 0x7c, 0xcd, 0x13, 0x72, 0x1d,  // int 13h, extended read by the packet at 7c38; jc fail
      0xfe, 0x06, 0x00, 0x80,  // inc byte [8000]
      0xb8, 0x00, 0x43, 0xbe, 0x38, 0x7c, 0xcd, 0x13, 0x72, 0x0f,  // int 13h, extended write; jc fail
      0xa0, 0x00, 0x80, 0x3c, 0x03, 0x73, 0x0c,  // mov al, [8000]; cmp al, 3; jae done
      0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee, 0xeb, 0x0a,  // out cf9, 6; jmp halt
      0xb0, 0x01, 0xeb, 0x02,  // fail: mov al, 1; jmp leave
      0xb0, 0x10,  // done: mov al, 10
      0xba, 0x01, 0x05, 0xee,  // leave: out 501, al
      0xf4, 0xeb, 0xfd, 0x90,  // halt: hlt; jmp halt
      0x10, 0x00, 0x01, 0x00, 0x00, 0x80, 0x00, 0x00,  // packet: 16 bytes, one sector, to 0:8000,
      0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,  // from sector 1
    ] + [UInt8](repeating: 0, count: 510 - 72) + [0x55, 0xaa]

  @Test(.timeLimit(.minutes(2)), arguments: ["off", "on"])
  func firmwareBootsThreeTimesFromOurDisk(eventIndex: String) throws {
    let qemu = "/usr/bin/qemu-system-x86_64"
    guard FileManager.default.isExecutableFile(atPath: qemu), let block = BlockProgram.martletBlock else {
      print("Skipped: needs \(qemu) and martlet-block")
      return
    }
    var image = [UInt8](repeating: 0, count: 1 << 20)
    image.replaceSubrange(0..<512, with: Self.bootSector)
    image.replaceSubrange(513..<530, with: Array("through the queue".utf8))
    let disk = try BlockProgram(block, image: image) { image, socket in ["--socket-path=\(socket)", "--blk-file=\(image)"] }
    _ = try disk.connect()

    let machine = Process()
    machine.executableURL = URL(fileURLWithPath: qemu)
    machine.arguments = [
      "-nodefaults", "-display", "none", "-machine", "q35,accel=tcg", "-m", "64",
      "-object", "memory-backend-memfd,id=memory,size=64M,share=on", "-numa", "node,memdev=memory",
      "-chardev", "socket,id=disk,path=\(disk.socketPath)",
      "-device", "vhost-user-blk-pci,chardev=disk,bootindex=0,disable-legacy=on,event_idx=\(eventIndex)",
      "-device", "isa-debug-exit,iobase=0x501",
    ]
    machine.standardInput = FileHandle.nullDevice
    try machine.run()
    // A machine that hangs must not hold up the tests.
    let end = Date().addingTimeInterval(60)
    while machine.isRunning, Date() < end { usleep(20_000) }
    if machine.isRunning { kill(machine.processIdentifier, SIGKILL) }
    machine.waitUntilExit()
    // isa-debug-exit: twice the value and one.
    #expect(machine.terminationStatus == 0x21)
    #expect(try disk.imageBytes(512..<530) == [3] + Array("through the queue".utf8))
    #expect(disk.process.isRunning)
  }

  @Test("QEMU is killed, and then both it and the disk's process: what comes next goes on", .timeLimit(.minutes(3)))
  func eitherSideIsKilled() throws {
    guard let (qemu, folder) = try Self.place() else { return }
    defer { try? FileManager.default.removeItem(atPath: folder) }
    // Enough boots for both to be killed in between.
    let boots: UInt8 = 8
    var sector = Self.bootSector
    let place = try #require(sector.indices.first { Array(sector[$0...].prefix(4)) == [0x80, 0x3C, 0x03, 0x73] })
    sector[place + 2] = boots
    try Data(sector + [UInt8](repeating: 0, count: (1 << 20) - 512)).write(to: URL(fileURLWithPath: folder + "/disk.img"))
    func count() -> UInt8 {
      guard let file = FileHandle(forReadingAtPath: folder + "/disk.img") else { return 0 }
      try? file.seek(toOffset: 512)
      return (try? file.read(upToCount: 1))?.first ?? 0
    }
    var disk = try Self.startDisk(folder)
    // Killed once by itself, once together with the disk.
    for number in UInt8(1)...2 {
      let machine = try Self.startMachine(qemu, folder)
      waitWhile { count() < number && machine.isRunning }
      machine.signal(SIGKILL)
      _ = machine.wait()
      #expect((number..<boots).contains(count()))
      guard number == 2 else { continue }
      disk.signal(SIGKILL)
      _ = disk.wait()
      disk = try Self.startDisk(folder)
    }
    let result = try Self.startMachine(qemu, folder).wait(seconds: 60)
    #expect(result.code == 0x21 && count() == boots, "\(count()) boots: \(result.errors)")
    disk.signal(SIGTERM)
    #expect(disk.wait().code == 0)
  }

  @Test("The disk's process is killed under a running QEMU, which connects to the next one: nothing is lost", .timeLimit(.minutes(3)))
  func theDiskIsKilled() throws {
    guard let (qemu, folder) = try Self.place() else { return }
    defer { try? FileManager.default.removeItem(atPath: folder) }
    // The same sector without the reset: it reads, adds one to a word, writes, over and over, until the word's high byte is so much.
    let rounds: UInt8 = 64
    var sector = Self.bootSector
    sector[13] = 0xFF  // inc word [8000]
    sector[28] = 0x01  // mov al, [8001]
    sector[31] = rounds
    sector.replaceSubrange(34..<36, with: [0xEB, 0xE0])  // jmp to the read
    try Data(sector + [UInt8](repeating: 0, count: (1 << 20) - 512)).write(to: URL(fileURLWithPath: folder + "/disk.img"))
    func count() -> Int {
      guard let file = FileHandle(forReadingAtPath: folder + "/disk.img") else { return 0 }
      try? file.seek(toOffset: 512)
      guard let bytes = try? file.read(upToCount: 2), bytes.count == 2 else { return 0 }
      return Int(bytes[0]) | Int(bytes[1]) << 8
    }
    var disk = try Self.startDisk(folder)
    let machine = try Self.startMachine(qemu, folder, reconnecting: true)
    var kills = 0
    for _ in 0..<3 {
      let before = count()
      for _ in 0..<12000 where machine.isRunning && count() < before + 200 { usleep(5000) }
      guard machine.isRunning else { break }
      disk.signal(SIGKILL)
      _ = disk.wait()
      disk = try Self.startDisk(folder)
      kills += 1
    }
    let result = machine.wait(seconds: 90)
    #expect(result.code == 0x21 && count() == Int(rounds) << 8, "\(count()) rounds: \(result.errors)")
    #expect(kills == 3)
    disk.signal(SIGTERM)
    #expect(disk.wait().code == 0)
  }

  /// QEMU, and a directory for one test; nil where the programs are missing.
  private static func place() throws -> (qemu: String, folder: String)? {
    let qemu = "/usr/bin/qemu-system-x86_64"
    guard FileManager.default.isExecutableFile(atPath: qemu), BuiltPrograms.exists("martlet-block") else {
      print("Skipped: needs \(qemu) and martlet-block")
      return nil
    }
    let folder = "/tmp/martlet-qemu-\(UUID().uuidString)"
    try FileManager.default.createDirectory(atPath: folder, withIntermediateDirectories: true)
    return (qemu, folder)
  }

  private static func startDisk(_ folder: String) throws -> RunningProgram {
    unlink(folder + "/socket")
    let disk = try RunningProgram(
      BuiltPrograms.path("martlet-block"), ["--socket-path=\(folder)/socket", "--blk-file=\(folder)/disk.img"])
    waitWhile { access(folder + "/socket", F_OK) != 0 && disk.isRunning }
    return disk
  }

  /// - Parameter reconnecting: QEMU connects again every second when it has lost the disk.
  private static func startMachine(_ qemu: String, _ folder: String, reconnecting: Bool = false) throws -> RunningProgram {
    try RunningProgram(
      qemu,
      [
        "-nodefaults", "-display", "none", "-machine", "q35,accel=tcg", "-m", "64", "-object",
        "memory-backend-memfd,id=memory,size=64M,share=on", "-numa", "node,memdev=memory", "-chardev",
        "socket,id=disk,path=\(folder)/socket\(reconnecting ? ",reconnect=1" : "")", "-device",
        "vhost-user-blk-pci,chardev=disk,bootindex=0,disable-legacy=on", "-device", "isa-debug-exit,iobase=0x501",
      ])
  }
}
