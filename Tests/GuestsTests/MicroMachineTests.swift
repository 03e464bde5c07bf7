// The machine as micro guests see it under `martlet run`: boot protocols, memory, processors, PCI, resets.

import Foundation
import TestSupport
import Testing

@Suite("Micro guests under martlet run: the machine", .enabled(if: MicroVM.canRun, MicroVM.cannotRun))
struct MicroMachineTests {
  @Test(
    "each image starts by its boot protocol, finds its tables and powers off",
    arguments: [(MicroGuest.Image.elf, "pvh"), (.unpaddedELF, "pvh"), (.bzImage, "linux64")])
  func starts(_ image: MicroGuest.Image, _ path: String) throws {
    let vm = try MicroVM()
    let run = try vm.run(
      "test=boot,exits,registers n=200 cpus=2 mib=96 mark=nut", ["--memory", "size=96M", "--cpus", "boot=2"], image: image)
    #expect(run.isClean, run.summary)
    #expect(run.report("start")?.detail.hasPrefix("path \(path) ") == true, run.summary)
    #expect(run.report("boot.command-line")?.detail.hasSuffix("mark nut") == true, run.summary)
    #expect(run.report("boot.cpus") != nil && run.report("exits.cost") != nil, run.summary)
  }

  @Test(
    "memory below, at and above the 32-bit hole is all there, and only what is touched costs anything",
    arguments: [("64M", 0), ("3G", 0), ("5G", 16), ("200G", 16)])
  func memory(_ size: String, _ above: Int) throws {
    let vm = try MicroVM()
    let run = try vm.run("test=boot,memory", ["--memory", "size=\(size)"])
    #expect(run.isClean, run.summary)
    let words = run.report("memory")?.detail.split(separator: " ").map(String.init) ?? []
    #expect(words.count > 5 && words[3] == "above" && (Int(words[2]) ?? -1) >= above, run.summary)
  }

  @Test("all processors start", arguments: [4, 64])
  func processors(_ count: Int) throws {
    let vm = try MicroVM()
    let run = try vm.run("test=boot,smp cpus=\(count) patience=60000", ["--cpus", "boot=\(count)"])
    #expect(run.isClean, run.summary)
    #expect(run.report("smp.started")?.detail.hasPrefix("\(count - 1) of \(count - 1) ") == true, run.summary)
  }

  @Test func everyDeviceIsAFunctionThatAnswersAtEveryWidth() throws {
    let vm = try MicroVM()
    let disks = try vm.disk("a.img") + vm.disk("b.img") + vm.disk("c.img")
    // The bridge, three disks and the console.
    let run = try vm.run("test=pci functions=5", disks)
    #expect(run.isClean, run.summary)
    #expect(run.reports.count { $0.name == "pci.function" } == 5, run.summary)
  }

  @Test("a guest that resets is started again in place, its disk served as before", arguments: ["cf9", "i8042", "acpi", "triple"])
  func resets(_ way: String) throws {
    let vm = try MicroVM()
    let program = try vm.start("test=blk,smp,reset by=\(way) n=20 span=1", vm.disk() + ["--cpus", "boot=2"])
    try vm.wait(for: "MICRO reset ok", times: 4, of: program)
    #expect(try vm.ctl("info").output.contains("\"resets\":"))
    program.signal(SIGTERM)
    let run = MicroRun(program.wait())
    #expect(run.exitStatus == 143 && run.errors.isEmpty, run.summary)
    #expect(run.starts >= 4 && run.reports.allSatisfy(\.passed), run.summary)
    #expect(run.reports.count { $0.name == "blk.verify" } >= 4, run.summary)
    vm.expectNothingLeft()
  }

  @Test func withNoRebootTheFirstResetIsTheEnd() throws {
    let vm = try MicroVM()
    let run = try vm.run("test=reset by=acpi", ["--no-reboot"])
    #expect(run.exitStatus == 0 && run.starts == 1 && run.report("reset")?.passed == true, run.summary)
    #expect(run.report("done") == nil, run.summary)
  }

  @Test("nonsense in any register harms only the guest, and its devices work again after a reset", arguments: [1, 2])
  func fuzz(_ seed: Int) throws {
    let vm = try MicroVM()
    let run = try vm.run("test=fuzz,blk,msix seed=\(seed) n=5000 span=1", vm.disk() + ["--console", "file=console"])
    // What the guest did is worth a warning; it must be the device's end neither here nor there.
    #expect(run.passed && run.exitStatus == 0, run.summary)
    #expect(run.report("blk.verify") != nil && run.report("msix.retarget") != nil, run.summary)
    #expect(!run.errors.contains("killed by signal") && !run.errors.contains("exited"), run.summary)
  }
}
