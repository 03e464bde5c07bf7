// The micro guests on KVM alone: what fails here is the guests' or the host's fault, never Martlet's.

import Testing

@Suite("Micro guests on bare KVM", .enabled(if: MicroGuest.hasKVM, MicroGuest.needsKVM), .serialized)
struct BareMachineTests {
  @Test(
    "each image starts by its boot protocol and powers off",
    arguments: [
      (MicroGuest.Image.elf, "pvh"), (.unpaddedELF, "pvh"), (.bzImage, "linux64"),
    ])
  func starts(_ image: MicroGuest.Image, _ path: String) throws {
    let run = try MicroGuest.runBare(image, "test=exits n=10 mark=end")
    #expect(run.passed && run.exitStatus == 0, run.summary)
    #expect(run.report("start")?.detail.hasPrefix("path \(path) ") == true, run.summary)
  }

  @Test func sixtyFourProcessorsStartInBothInterruptControllerModes() throws {
    for mode in ["", " x2apic=1"] {
      let run = try MicroGuest.runBare(.elf, "test=smp cpus=64" + mode, options: ["--cpus", "64"])
      #expect(run.passed, run.summary)
      #expect(run.report("smp.started")?.detail.hasPrefix("63 of 63 ") == true, run.summary)
    }
  }

  @Test func aProcessorThatDoesNotExistIsMissed() throws {
    let run = try MicroGuest.runBare(.elf, "test=smp cpus=3 patience=500", options: ["--cpus", "2"])
    #expect(!run.passed)
    #expect(run.report("smp.started")?.detail.hasPrefix("1 of 2 ") == true, run.summary)
    #expect(run.report("done")?.passed == false, run.summary)
  }

  @Test func memoryAboveTheHoleIsReal() throws {
    let run = try MicroGuest.runBare(.elf, "test=memory", options: ["--memory", "5000"])
    #expect(run.passed, run.summary)
    #expect(run.report("memory")?.detail.contains(" 17 above 4 GiB, 0 wrong") == true, run.summary)
  }

  @Test func doorbellsComeBackAsInterrupts() throws {
    let run = try MicroGuest.runBare(.elf, "test=kick,irq doorbell=0xd0000000 n=200", options: ["--loopback"])
    #expect(run.passed, run.summary)
  }

  @Test func withoutLoopbackNoInterruptComes() throws {
    let run = try MicroGuest.runBare(.elf, "test=irq doorbell=0xd0000000 n=1")
    #expect(!run.passed && run.report("irq")?.passed == false, run.summary)
  }

  @Test("the guest can ask for a reset", arguments: ["cf9", "i8042", "acpi", "triple"])
  func resets(_ way: String) throws {
    let run = try MicroGuest.runBare(.elf, "test=reset by=\(way)")
    #expect(run.exitStatus == 3, run.summary)
    #expect(run.report("done") == nil)
  }

  @Test func anIdleGuestHaltsForTheTimeAsked() throws {
    let run = try MicroGuest.runBare(.bzImage, "test=idle ms=200")
    #expect(run.passed, run.summary)
  }
}
