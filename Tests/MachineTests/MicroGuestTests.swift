import Foundation
import Machine
import Testing

@Suite("Micro guests on the machine", .serialized)
struct MicroGuestTests {
  @Test(
    "A guest starts by each boot protocol, finds its tables and powers off",
    arguments: ["micro.elf", "micro-unpadded.elf", "micro.bzimage"])
  func boots(name: String) throws {
    guard let kernel = try MicroMachine.guest(name) else { return }
    let outcome = try MicroMachine(kernel: kernel, commandLine: "test=boot,exits,memory").run()
    #expect(outcome.end == .poweredOff)
    #expect(outcome.output.contains("MICRO done ok"), "\(outcome.output)")
    #expect(outcome.warnings == [])
  }

  @Test("Memory below, at and far above the 32-bit hole is all there", arguments: [64 << 20, 3 << 30, 5 << 30, 64 << 30] as [UInt64])
  func memory(size: UInt64) throws {
    guard let kernel = try MicroMachine.guest("micro.elf") else { return }
    let outcome = try MicroMachine(kernel: kernel, commandLine: "test=boot,memory", memory: size).run()
    #expect(outcome.end == .poweredOff)
    #expect(outcome.output.contains("MICRO done ok"), "\(outcome.output)")
  }

  @Test("All processors start", arguments: [2, 8, 64])
  func processors(count: Int) throws {
    guard let kernel = try MicroMachine.guest("micro.elf") else { return }
    let outcome = try MicroMachine(kernel: kernel, commandLine: "test=smp", processors: count).run()
    #expect(outcome.end == .poweredOff)
    #expect(outcome.output.contains("MICRO done ok"), "\(outcome.output)")
  }

  @Test("A guest that resets is started again in place, from each way of resetting", arguments: ["acpi", "cf9", "i8042", "triple"])
  func resets(way: String) throws {
    guard let kernel = try MicroMachine.guest("micro.elf") else { return }
    // The guest resets for ever; each start says so. Stop it after a while by its own power-off: count the starts.
    let outcome = try MicroMachine(
      kernel: kernel, commandLine: "test=boot,memory,smp,reset by=\(way)", processors: 3, resetLimit: 4
    ).run()
    #expect(outcome.end == .resetLimit, "\(outcome.output)")
    #expect(outcome.output.components(separatedBy: "MICRO start ok").count - 1 == 4, "\(outcome.output)")
    #expect(!outcome.output.contains("FAIL"), "\(outcome.output)")
  }

  @Test("A halted guest is woken by its timer; pausing and resuming in between does it no harm")
  func pauseWhileIdle() throws {
    guard let kernel = try MicroMachine.guest("micro.elf") else { return }
    let outcome = try MicroMachine(
      kernel: kernel, commandLine: "test=idle ms=300", processors: 2,
      onOutput: (
        "MICRO start",
        { machine in
          for _ in 0..<20 {
            machine.pause()
            machine.announcePause()
            machine.resume()
          }
        }
      )
    ).run()
    #expect(outcome.end == .poweredOff)
    #expect(outcome.output.contains("MICRO done ok"), "\(outcome.output)")
  }

  @Test("Pausing in the midst of port and memory accesses loses none of them")
  func pauseDuringAccesses() throws {
    guard let kernel = try MicroMachine.guest("micro.elf") else { return }
    var pauses = 0
    let outcome = try MicroMachine(
      kernel: kernel, commandLine: "test=exits,pci,registers,exits,smp", processors: 4,
      onOutput: (
        "MICRO start",
        { machine in
          for _ in 0..<300 {
            machine.pause()
            machine.resume()
            pauses += 1
          }
        }
      )
    ).run()
    #expect(outcome.end == .poweredOff)
    #expect(pauses == 300)
    #expect(!outcome.output.contains("exits FAIL"), "\(outcome.output)")
  }

  @Test("Nonsense written to any register harms nobody but the guest")
  func fuzz() throws {
    guard let kernel = try MicroMachine.guest("micro.elf") else { return }
    let outcome = try MicroMachine(
      kernel: kernel, commandLine: "test=fuzz",
      devices: [
        .init(device: .block, offeredFeatures: [], queueSizes: [256, 256], configuration: [UInt8](repeating: 1, count: 60)),
        .init(device: .net, offeredFeatures: [], queueSizes: [256, 256, 64]),
      ]
    ).run()
    #expect(outcome.end != .timedOut, "\(outcome.output)")
  }
}
