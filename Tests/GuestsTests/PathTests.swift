// Paths in directories that somebody else may write.

import Foundation
import Glibc
import TestSupport
import Testing

@Suite("Paths that are not what they seem", .enabled(if: MicroVM.canRun, MicroVM.cannotRun))
struct PathTests {
  @Test(arguments: ["file", "directory", "nothing"])
  func linksInPlaceOfWhatWeMakeAreNotFollowed(_ target: String) throws {
    let vm = try MicroVM()
    let victim = vm.path("victim")
    switch target {
    case "file": try "precious".write(toFile: victim, atomically: false, encoding: .utf8)
    case "directory": try FileManager.default.createDirectory(atPath: victim, withIntermediateDirectories: false)
    default: break
    }
    for socket in ["ctl", "con"] { try FileManager.default.createSymbolicLink(atPath: vm.path(socket), withDestinationPath: victim) }
    for options in [["--control", "ctl"], ["--console", "socket=con", "--control", "other"]] {
      let result = try vm.start("test=boot", options).wait()
      #expect(result.code == 3 && result.errorLines.count == 1, "\(result.errors)")
    }
    switch target {
    case "file": #expect(try String(contentsOfFile: victim, encoding: .utf8) == "precious")
    case "directory": #expect(try FileManager.default.contentsOfDirectory(atPath: victim).isEmpty)
    default: #expect(access(victim, F_OK) != 0)
    }
    for socket in ["ctl", "con"] { #expect(try FileManager.default.destinationOfSymbolicLink(atPath: vm.path(socket)) == victim) }
  }

  @Test func aFileInPlaceOfASocketStays() throws {
    let vm = try MicroVM()
    try "precious".write(toFile: vm.path("ctl"), atomically: false, encoding: .utf8)
    let result = try vm.start("test=boot").wait()
    #expect(result.code == 3 && result.errorLines.count == 1, "\(result.errors)")
    #expect(try String(contentsOfFile: vm.path("ctl"), encoding: .utf8) == "precious")
  }

  @Test func whatSomebodyElsePutAtOurPlaceStays() throws {
    let vm = try MicroVM()
    let program = try vm.start("test=idle ms=60000", ["--console", "socket=con"])
    let end = Date().addingTimeInterval(60)
    while Date() < end, try !vm.ctl("info").output.contains("\"state\":\"running\"") { usleep(5000) }
    try FileManager.default.removeItem(atPath: vm.path("con"))
    try "theirs".write(toFile: vm.path("con"), atomically: false, encoding: .utf8)
    program.signal(SIGTERM)
    #expect(program.wait().code == 143)
    #expect(try String(contentsOfFile: vm.path("con"), encoding: .utf8) == "theirs")
    #expect(access(vm.path("ctl"), F_OK) != 0)
  }
}
