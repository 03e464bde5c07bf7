import Foundation
import HostSystem
import TestSupport
import Testing
import VMMemory
import VirtioQueue
import VirtioSpec

@Suite struct DurabilityTests {
  private static let hasStrace = FileManager.default.isExecutableFile(atPath: "/usr/bin/strace")

  /// Names of the calls a traced program made on storage, in order. A write that the kernel makes stable by itself would be told of what
  /// another has lost.
  private func trace(_ rig: BlockRig) -> [Substring] {
    rig.program.log.split(separator: "\n").compactMap { line in
      for call in ["fdatasync", "pwritev2", "preadv"] where line.contains(call + "(") {
        return call == "pwritev2" ? (line.contains("RWF_DSYNC") ? "write and sync" : "write") : Substring(call)
      }
      return nil
    }
  }

  private func traced(_ arguments: [String] = [], wanting wanted: @escaping (FeatureSet) -> FeatureSet) throws -> BlockRig {
    try BlockRig(
      arguments: ["--aio=threads"] + arguments,
      wrapper: ["/usr/bin/strace", "-f", "-qq", "-e", "trace=fdatasync,pwritev2,preadv", "-o", "/dev/stderr"], wanting: wanted)
  }

  @Test(.enabled(if: hasStrace, "strace is needed to see the calls"))
  func aFlushIsOneSyncAndAWriteIsNone() throws {
    let rig = try traced { $0.subtracting(.packedRing) }
    for sector in 0..<5 { #expect(try rig.write(UInt64(sector), pattern(512, 1)).status == 0) }
    #expect(trace(rig) == Array(repeating: "write", count: 5))
    #expect(try rig.flush().status == 0)
    #expect(try rig.flush().status == 0)
    #expect(trace(rig) == Array(repeating: "write", count: 5) + ["fdatasync", "fdatasync"])
  }

  @Test(.enabled(if: hasStrace, "strace is needed to see the calls"))
  func withoutFlushEveryWriteIsDurable() throws {
    let rig = try traced { $0.subtracting([.packedRing, .blockFlush]) }
    #expect(try rig.front.configuration(96)[32] == 0)
    #expect(try rig.write(0, pattern(512, 1)).status == 0)
    #expect(try rig.ranges(13, [(0, 8, 0)]).status == 0)
    #expect(trace(rig) == ["write", "fdatasync", "fdatasync"])
  }

  @Test(.enabled(if: hasStrace, "strace is needed to see the calls"))
  func theDriverCanSwitchTheCacheOffAndOn() throws {
    let rig = try traced { $0.subtracting(.packedRing) }
    #expect(try rig.front.configuration(96)[32] == 1)
    try rig.front.writeConfiguration([0], at: 32)
    #expect(try rig.front.configuration(96)[32] == 0)
    #expect(try rig.write(0, pattern(512, 1)).status == 0)
    // A stop and a start with the same features do not loosen it.
    let base = try rig.front.stop(rig.front.queues[0])
    _ = try rig.front.frontEnd.request(.setFeatures(rig.front.features.union(.vhostUserProtocolFeatures)))
    try rig.front.start(rig.front.queues[0], base: base)
    #expect(try rig.write(0, pattern(512, 2)).status == 0)
    try rig.front.writeConfiguration([1], at: 32)
    #expect(try rig.write(0, pattern(512, 3)).status == 0)
    #expect(trace(rig) == ["write", "fdatasync", "write", "fdatasync", "write"])
    // Nothing else can be written.
    #expect(throws: (any Error).self) { try rig.front.writeConfiguration([1], at: 0) }
    #expect(throws: (any Error).self) { try rig.front.writeConfiguration([2], at: 32) }
    #expect(throws: (any Error).self) { try rig.front.writeConfiguration([1, 0], at: 32) }
  }

  @Test func whatWasAnsweredSurvivesAKill() throws {
    let image = "/tmp/martlet-kill-" + UUID().uuidString
    defer { unlink(image) }
    _ = FileManager.default.createFile(atPath: image, contents: nil)
    truncate(image, 8 << 20)
    var random = SeededRandom(77)
    // What every sector has to contain: one value, or one of several while a write was not answered.
    var certain: [UInt64: UInt64] = [:]
    for _ in 0..<10 {
      let rig = try BlockRig(image: image)
      let queue = rig.front.queues[0]
      let memory = rig.front.memory
      var outstanding: [UInt16: (sector: UInt64, seed: UInt64, status: GuestAddress)] = [:]
      var unanswered: [UInt64: UInt64] = [:]
      let slots = (0..<32).map { _ in rig.front.allocate(4096, alignment: 512) }
      var next = 0
      let kill = Int.random(in: 50..<400, using: &random)
      var answered = 0
      while answered < kill {
        while outstanding.count < 30 {
          let slot = slots[next % 32]
          let sector = UInt64.random(in: 0..<16384, using: &random)
          if outstanding.values.contains(where: { $0.sector == sector || $0.status.rawValue / 4096 == slot.rawValue / 4096 }) { break }
          next += 1
          let seed = random.next()
          let status = GuestAddress(slot.rawValue + 16)
          let data = GuestAddress(slot.rawValue + 512)
          _ = memory.store(UInt32(1), at: slot)
          _ = memory.store(sector, at: GuestAddress(slot.rawValue + 8))
          _ = memory.copyIn(pattern(512, seed), at: data)
          let buffers = [
            DriverBuffer(slot, 16, isDeviceWritable: false), DriverBuffer(data, 512, isDeviceWritable: false),
            DriverBuffer(status, 1, isDeviceWritable: true),
          ]
          guard let head = queue.driver.add(buffers.span) else { break }
          outstanding[head] = (sector, seed, status)
        }
        queue.show()
        let used = try queue.nextUsed()
        if let done = outstanding.removeValue(forKey: used.head) {
          #expect(memory.load(UInt8.self, at: done.status) == 0)
          certain[done.sector] = done.seed
        }
        answered += 1
      }
      for request in outstanding.values { unanswered[request.sector] = request.seed }
      rig.program.kill9()
      // Answered, though nobody has looked yet: answered all the same.
      while case .used(let head, _) = queue.driver.nextUsed() {
        if let done = outstanding.removeValue(forKey: head) {
          certain[done.sector] = done.seed
          unanswered[done.sector] = nil
        }
      }
      let content = rig.content
      for (sector, seed) in certain where unanswered[sector] == nil {
        let start = Int(sector) * 512
        guard Array(content[start..<(start + 512)]) == pattern(512, seed) else {
          Issue.record("sector \(sector) lost what was answered")
          return
        }
      }
      // What was not answered may or may not have happened; look which it was before going on.
      for (sector, seed) in unanswered {
        let start = Int(sector) * 512
        let found = Array(content[start..<(start + 512)])
        if found == pattern(512, seed) {
          certain[sector] = seed
        } else if certain[sector] == nil {
          check(found.allSatisfy { $0 == 0 }, "an unanswered write is there or not")
        }
      }
    }
  }

  @Test func aFullFileSystemIsAnErrorAndNothingElse() throws {
    guard geteuid() == 0 else { return }
    let place = "/tmp/martlet-full-" + UUID().uuidString
    try FileManager.default.createDirectory(atPath: place, withIntermediateDirectories: false)
    defer { rmdir(place) }
    guard mount("tmpfs", place, "tmpfs", 0, "size=1m") == 0 else { return }
    defer { umount2(place, 2) }
    let image = place + "/disk"
    _ = FileManager.default.createFile(atPath: image, contents: nil)
    truncate(image, 16 << 20)
    for access in ["io_uring", "threads"] {
      truncate(image, 0)
      truncate(image, 16 << 20)
      let rig = try BlockRig(image: image, arguments: ["--aio=" + access])
      var failed = 0
      for index in 0..<64 {
        let answer = try rig.write(UInt64(index * 64), pattern(32768, UInt64(index)))
        #expect(answer.status <= 1)
        if answer.status == 0 {
          check(try rig.read(UInt64(index * 64), 64).data == pattern(32768, UInt64(index)), "what was written is there")
        } else {
          failed += 1
        }
      }
      #expect(failed > 16 && failed < 64)
      #expect(rig.program.log.contains("no space left"))
      // Given back, the space can be used again.
      #expect(try rig.ranges(11, [(0, 4096, 0)]).status == 0)
      #expect(try rig.write(8192, pattern(4096, 1)).status == 0)
    }
  }
}
