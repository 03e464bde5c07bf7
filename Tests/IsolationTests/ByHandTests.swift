import Foundation
import Glibc
import HostSystem
import TestSupport
import Testing
import VMMemory
import VirtioQueue

/// Device programs that nobody's supervisor has started.
@Suite struct ByHandTests {
  private static let programs: [[String]] = [
    ["martlet-block", "--blk-null=1048576", "--num-queues=1"], ["martlet-block", "--num-queues=1", "--aio=threads"], ["martlet-template"],
    ["martlet-console", "--null"],
  ]

  private func status(_ program: DeviceProcess) -> [String: String] {
    let text = (try? String(contentsOfFile: "/proc/\(program.processID)/status", encoding: .utf8)) ?? ""
    return Dictionary(
      text.split(separator: "\n").compactMap { line in
        let parts = line.split(separator: ":", maxSplits: 1)
        return parts.count == 2 ? (String(parts[0]), parts[1].trimmingCharacters(in: .whitespaces)) : nil
      }, uniquingKeysWith: { $1 })
  }

  @Test("Asked to, a program that listens closes itself in, and serves front ends one after another", arguments: programs)
  func programsStartedByHandCloseThemselvesIn(words: [String]) throws {
    let image = "/tmp/martlet-by-hand-" + UUID().uuidString
    defer { unlink(image) }
    _ = FileManager.default.createFile(atPath: image, contents: Data(repeating: 7, count: 1 << 20))
    let needsImage = words[0] == "martlet-block" && !words.contains { $0.hasPrefix("--blk-null") }
    let arguments = Array(words.dropFirst()) + (needsImage ? ["--blk-file=" + image] : []) + ["--sandbox=on"]
    let program = try DeviceProcess(words[0], arguments)
    for _ in 0..<3 {
      let front = try TestFrontEnd(try program.connect(), wanting: { $0.subtracting(.packedRing) })
      let queue = try front.startQueue(size: 64)
      if needsImage {
        let header = front.allocate(16)
        _ = front.memory.copyIn([UInt8](repeating: 0, count: 16), at: header)
        let data = front.allocate(513)
        queue.offer([DriverBuffer(header, 16, isDeviceWritable: false), DriverBuffer(data, 513, isDeviceWritable: true)])
        #expect(try queue.nextUsed().written == 513)
        #expect(front.memory.bytes(at: data, count: 512) == [UInt8](repeating: 7, count: 512))
      }
      _ = try front.stop(queue)
    }
    // Memory that a front end cuts off costs it its connection, and nobody else anything.
    do {
      let front = try TestFrontEnd(try program.connect(), memoryByteCount: 8 << 20, wanting: { $0.subtracting(.packedRing) }, sealed: false)
      let queue = try front.startQueue(size: 64)
      #expect(ftruncate(front.memoryFD.rawValue, 0) == 0)
      queue.kick.signal()
      let end = MonotonicTime.now.advanced(by: .seconds(10))
      var isConnected = true
      while isConnected, MonotonicTime.now < end, words[0] != "martlet-console" {
        isConnected = (try? front.frontEnd.number(.getFeatures)) != nil
        if isConnected { usleep(2000) }
      }
      // A console that nobody talks to has nothing to look for there.
      #expect(!isConnected || words[0] == "martlet-console")
    }
    _ = try TestFrontEnd(try program.connect())
    let facts = status(program)
    #expect(facts["Seccomp"] == "2" && facts["NoNewPrivs"] == "1")
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] { #expect(facts[set] == "0000000000000000", "\(set)") }
    // Only root may empty it.
    if geteuid() == 0 { #expect(facts["CapBnd"] == "0000000000000000") }
    program.signal(SIGTERM)
    #expect(program.exitCode() == 0, "\(program.log)")
    // Nothing can be removed from behind walls, and the next one takes its place.
    #expect(FileManager.default.fileExists(atPath: program.socketPath))
    let next = try DeviceProcess(words[0], arguments + ["--socket-path=" + program.socketPath], listens: false)
    #expect(next.isRunning)
    let end = MonotonicTime.now.advanced(by: .seconds(10))
    var isThere = false
    while !isThere, MonotonicTime.now < end, next.isRunning {
      isThere = (try? UnixSocket.connect(to: program.socketPath)) != nil
      if !isThere { usleep(2000) }
    }
    #expect(isThere, "\(next.log)")
  }

  @Test("One that is not confined says so, and how it would be", arguments: programs)
  func whatIsNotConfinedSaysSo(words: [String]) throws {
    guard words.count < 3 || words.contains(where: { $0.hasPrefix("--blk-null") }) else { return }
    let program = try DeviceProcess(words[0], Array(words.dropFirst()))
    _ = try program.connect()
    #expect(program.everyLine.contains("This process is not confined; --sandbox=on confines it, and martlet run does that and more"))
    #expect(status(program)["Seccomp"] == "0")
  }
}
