// The guest runs before its back ends are ready, and waits for them where it looks for them.

import Foundation
import TestSupport
import Testing

@Suite("A guest whose back end is late", .enabled(if: MicroVM.canRun, MicroVM.cannotRun))
struct StartOrderTests {
  /// A block process of its own that is stopped before the VM connects.
  private static func lateBackEnd(_ vm: MicroVM) throws -> RunningProgram {
    _ = try vm.disk()
    let program = try RunningProgram(
      BuiltPrograms.path("martlet-block"), ["--socket-path=be", "--blk-file=disk.img"], directory: vm.directory)
    waitWhile { access(vm.path("be"), F_OK) != 0 }
    program.signal(SIGSTOP)
    return program
  }

  @Test("runs at once, waits on the PCI bus, and then finds its disk")
  func waits() throws {
    let vm = try MicroVM()
    let backEnd = try Self.lateBackEnd(vm)
    let program = try vm.start("test=boot,blk span=1 n=20", ["--disk", "vhost_user=on,socket=be"])
    try vm.wait(for: "MICRO start", of: program)
    usleep(200_000)
    #expect(!program.outputText.contains("blk."), "\(program.outputText)")
    backEnd.signal(SIGCONT)
    let run = MicroRun(program.wait())
    #expect(run.isClean && run.report("blk.verify") != nil, run.summary)
    backEnd.signal(SIGTERM)
    #expect(backEnd.wait().code == 0)
    unlink(vm.path("be"))
    vm.expectNothingLeft()
  }

  @Test("may power off without it, and its last words are heard")
  func powersOff() throws {
    let vm = try MicroVM()
    let backEnd = try Self.lateBackEnd(vm)
    let result = try vm.start("test=idle ms=1", ["--disk", "vhost_user=on,socket=be"]).wait()
    #expect(result.code == 0 && result.errors == "", "\(result.errors)")
    #expect(result.output.contains("MICRO done ok"), "\(result.output)")
    backEnd.signal(SIGCONT)
    backEnd.signal(SIGTERM)
    _ = backEnd.wait()
    unlink(vm.path("be"))
    vm.expectNothingLeft()
  }
}
