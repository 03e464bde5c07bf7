import ControlProtocol
import Glibc
import TestSupport
import Testing

@Suite(.enabled(if: BuiltPrograms.exists("martlet"), "These tests need the built programs."))
struct DoctorTests {
  private func doctor() throws -> (result: ProgramResult, findings: [JSONValue]) {
    let result = try RunningProgram(BuiltPrograms.path("martlet"), ["doctor", "--json"]).wait()
    return (result, try JSONValue(parsing: result.output)["findings"]?.array ?? [])
  }

  @Test func exitCodeSaysWhatTheFindingsSay() throws {
    let (result, findings) = try doctor()
    #expect(findings.count >= 7)
    let isMissing = findings.contains { $0["status"]?.string == "missing" }
    #expect(result.code == (isMissing ? 1 : 0))
    #expect(result.errors == "")
  }

  @Test func everyShortcomingHasARemedy() throws {
    for finding in try doctor().findings {
      #expect((finding["status"]?.string == "ok") == (finding["remedy"]?.string == ""), "\(finding.text)")
    }
  }

  @Test(.enabled(if: access("/dev/kvm", R_OK | W_OK) == 0, "Needs /dev/kvm."))
  func instructionsAreTriedWhereKVMIs() throws {
    let finding = try #require(try doctor().findings.first { $0["name"]?.string == "instructions" })
    let text = try #require(finding["text"]?.string)
    #expect(text.hasPrefix("all ") || text.hasPrefix("of "))
  }

  @Test(.enabled(if: geteuid() == 0, "Hiding /dev/kvm needs root."))
  func hostWithoutKVMIsToldSo() throws {
    let script = "mount -t tmpfs none /dev && exec \(BuiltPrograms.path("martlet")) doctor"
    let result = try RunningProgram("/usr/bin/unshare", ["-m", "sh", "-c", script]).wait()
    #expect(result.code == 1)
    #expect(result.output.hasPrefix("MISSING  kvm"))
    #expect(result.output.contains("modprobe kvm_intel or kvm_amd"))
    #expect(result.output.hasSuffix("Stock guests do not run here.\n"))
  }
}
