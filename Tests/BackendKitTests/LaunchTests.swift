import BackendKit
import HostSystem
import Testing

private let options: [LaunchOption] = [.value("blk-file", "PATH", "image"), .flag("read-only", "no writes")]

private func parse(_ words: String...) throws -> LaunchArguments { try LaunchArguments.parse(words, options: options) }

private func complaint(_ words: String...) -> String {
  do {
    _ = try LaunchArguments.parse(words, options: options)
    return "none"
  } catch { return "\(error)" }
}

@Suite struct LaunchTests {
  @Test func bothSpellingsMeanTheSame() throws {
    for arguments in [try parse("--fd=7", "--blk-file=/a=b"), try parse("--fd", "7", "--blk-file", "/a=b")] {
      #expect(arguments.connection == .descriptor(7))
      #expect(arguments.value("blk-file") == "/a=b")
      #expect(!arguments.has("read-only"))
      #expect(!arguments.isSupervised)
    }
    #expect(try parse("--socket-path=/s", "--read-only").connection == .listen("/s"))
    #expect(try parse("--fd=3", "--ready-fd=4", "--title=vm/a/b").isSupervised)
  }

  @Test func mistakesAreNamedWithTheNearestName() {
    #expect(complaint("--fd=3", "--blkfile=x") == "Unknown option --blkfile; did you mean --blk-file?")
    #expect(complaint("--fd=3", "--qqqqqqqqqqqqqqqqqqqqqqqq") == "Unknown option --qqqqqqqqqqqqqqqqqqqqqqqq; see --help")
    #expect(complaint("--fd=3", "stray") == "Unknown option stray; see --help")
    #expect(complaint("--fd=x").contains("--fd needs a descriptor number"))
    #expect(complaint("--fd=-1").contains("--fd needs a descriptor number"))
    #expect(complaint("--fd").contains("needs a value"))
    #expect(complaint("--fd=").contains("needs a value"))
    #expect(complaint("--fd=3", "--read-only=yes").contains("takes no value"))
    #expect(complaint("--fd=3", "--blk-file=a", "--blk-file=b").contains("given twice"))
    #expect(complaint("--fd=3", "--socket-path=/s").contains("Exactly one"))
    #expect(complaint("--read-only").contains("Exactly one"))
    #expect(complaint("--fd=3", "--log=loud").contains("not loud"))
  }

  @Test func capabilitiesNeedNoConnection() throws {
    #expect(try parse("--print-capabilities").request == .printCapabilities)
    #expect(try parse("--print-capabilities", "--help").request == .help)
    #expect(BackendProgram(type: "rng").capabilities == #"{"type": "rng"}"#)
    #expect(
      BackendProgram(type: "block", features: ["read-only", "blk-file"]).capabilities
        == #"{"type": "block", "features": ["read-only", "blk-file"]}"#)
  }

  @Test func numbersAreChecked() throws {
    let arguments = try LaunchArguments.parse(["--fd=3", "--n=12"], options: [.value("n", "N", "")])
    #expect(try arguments.number("n", in: 1...12) == 12)
    #expect(throws: BackendError.self) { try arguments.number("n", in: 1...11) }
    #expect(throws: BackendError.self) {
      try LaunchArguments.parse(["--fd=3", "--n=1x"], options: [.value("n", "N", "")]).number("n", in: 0...9)
    }
  }
}
