import Sandbox
import Supervision
import Testing

@Suite struct JailProfileTests {
  private func problem(_ text: String) -> String {
    do throws(JailError) {
      _ = try JailProfile(text, file: "p")
      return "read"
    } catch { return error.message }
  }

  @Test func everyStatementIsRead() throws {
    let profile = try JailProfile(
      """
      # comment
      program /usr/bin/x          # which
      user 70000:70001
      network yes
      proc all
      working-directory "/srv/my data"
      file {image} rw
      file /etc/a ro optional
      directory "/srv/my data" run
      device /dev/null rw
      temporary /tmp 64M
      descriptor 5
      environment LANG=C
      environment HOME
      capability CAP_CHOWN        # files of others
      limit memory 1G
      call read                   # reads
      call mmap arg2 & 0x4 == 0   # maps
      refuse clone3 ENOSYS        # flags
      """, file: "p")
    #expect(profile.program == "/usr/bin/x")
    #expect(profile.user == .ids(uid: 70000, gid: 70001))
    #expect(profile.hasNetwork && profile.hasProc && profile.hasWholeProc)
    #expect(profile.directory == "/srv/my data")
    #expect(profile.places.map(\.path) == ["{image}", "/etc/a", "/srv/my data", "/dev/null", "/tmp"])
    #expect(profile.places.map(\.access) == [.readWrite, .readOnly, .run, .readWrite, .readWrite])
    #expect(profile.places.map(\.isOptional) == [false, true, false, false, false])
    #expect(profile.places[4].size == 64 << 20)
    #expect(profile.descriptors == [5] && profile.capabilities == [0])
    #expect(profile.environment.map(\.name) == ["LANG", "HOME"] && profile.environment[1].value == nil)
    #expect(profile.limits.map(\.value) == [1 << 30])
    #expect(profile.calls.map(\.number) == [0, 9] && profile.refused.map(\.number) == [435])
  }

  @Test(arguments: [
    ("prgram /x", "line 1: Unknown keyword 'prgram'; did you mean 'program'?"),
    ("\nfile x ro", "line 2: Path 'x' is not absolute"),
    ("file /x rx", "Unknown access 'rx'; did you mean"),
    ("file /x", "'file' wants a path, one of ro, rw, run"),
    ("directory \"/x ro", "A quote is not closed"),
    ("call opnat # x", "Unknown system call 'opnat'; did you mean 'openat'?"),
    ("call read", "has no reason"),
    ("call read arg9 == 1 # x", "condition 'arg9 == 1' is not"),
    ("refuse clone3 ENOWAY", "Error 'ENOWAY' is none of"),
    ("capability CAP_CHOWN", "has no reason"),
    ("capability CAP_CHWON # x", "did you mean 'CAP_CHOWN'?"),
    ("limit memory 4K", "No program can start with memory limited to 4K"),
    ("limit descriptors 2", "No program can start with descriptors limited to 2"),
    ("limit descriptors many", "'many' is no number"),
    ("limit cpu 1", "Unknown limit 'cpu'"),
    ("limit threads 4\nlimit threads 5", "line 2: Limit 'threads' is given twice"),
    ("network no\nnetwork yes", "line 2: 'network yes' contradicts line 1, 'network no'; take one of the two out"),
    ("proc all\n\nproc no", "line 3: 'proc no' contradicts line 1, 'proc all'"),
    ("user own\nuser keep", "line 2: 'user keep' contradicts line 1, 'user own'"),
    ("program /a\nprogram /b", "line 2: 'program /b' contradicts line 1, 'program /a'"),
    ("working-directory /a\nworking-directory /b", "line 2: 'working-directory /b' contradicts line 1"),
    ("file /x ro\nfile /x rw", "line 2: 'file /x rw' contradicts line 1, 'file /x ro'"),
    ("file /x rw\nfile /x run", "line 2: 'file /x run' contradicts line 1, 'file /x rw'"),
    ("directory /x ro\nfile /x ro", "line 2: 'file /x ro' contradicts line 1, 'directory /x ro'"),
    ("directory /x rw\ntemporary /x 64K", "line 2: 'temporary /x' contradicts line 1, 'directory /x rw'"),
    ("call read # x\nrefuse read EPERM", "line 2: 'refuse read' contradicts line 1, 'call read'"),
    ("refuse read EPERM\ncall read # x", "line 2: 'call read' contradicts line 1, 'refuse read EPERM'"),
    ("refuse read EPERM\nrefuse read EACCES", "line 2: 'refuse read EACCES' contradicts line 1, 'refuse read EPERM'"),
    ("environment A=1\nenvironment A", "line 2: 'environment A' contradicts line 1, 'environment A=1'"),
    ("descriptor 2", "is not a number from 3 to 31"),
    ("network perhaps", "is neither yes nor no"),
    ("user root", "is none of own, keep, UID, UID:GID"),
    ("temporary /tmp 1", "is not one from 4K to 1T"),
  ])
  func whatMeansNothingIsRefusedWithItsLineAndARemedy(text: String, message: String) {
    #expect(problem(text).contains(message), "\(problem(text))")
  }

  @Test func whatIsSaidTwiceOrAddsUpIsNoContradiction() throws {
    let profile = try JailProfile(
      """
      network yes
      network yes
      file /x ro
      file /x run
      file /x ro
      file /y rw
      file /y rw
      call read arg0 == 1  # one
      call read arg0 == 2  # two
      refuse read EPERM
      """, file: "p")
    #expect(profile.hasNetwork && profile.calls.count == 2 && profile.refused.count == 1)
    #expect(profile.places.first?.path == "/x" && profile.places.first?.access == .run)
  }

  @Test func namesInBracesAreFilledIn() {
    var missing: String?
    #expect(JailProfile.expand("{a}/b/{c}", ["a": "/x", "c": "y"], missing: &missing) == "/x/b/y")
    #expect(missing == nil)
    _ = JailProfile.expand("{a}/{q}", ["a": "/x"], missing: &missing)
    #expect(missing == "q")
    #expect(JailProfile.normal("//a/./b/") == "/a/b")
    #expect(JailProfile.normal("/a/../b") == nil && JailProfile.normal("a") == nil)
  }
}
